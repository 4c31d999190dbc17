"""The work of the processes in tests of adapters, and the same in plain PyTorch."""

import dataclasses
import hashlib

import torch

from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import exit_depths, trained_exits
from megatron_sorted.settings.lora import is_adapter, rank_at
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.adapters import use_ranks
from megatron_sorted.training.run.checkpoints import Checkpoints, choose_checkpoint
from megatron_sorted.training.run.inputs import find_checkpoints
from megatron_sorted.training.step.build import Model, unwrap
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.reduce import reduce_ledger
from megatron_sorted.training.step.train_step import train_step
from tests.support.gather import global_name, shards_of
from tests.support.given_weights import compute_logits, cut_shard
from tests.support.rank_bodies import complete_gradients, save_now, start
from tests.support.reference import exit_losses
from tests.support.tiny import make_samples, micro_batches

TRAINED_EXIT_PARTS = ("exit_norms.", "exit_output_layers.")


def made_up_b(name: str, shape: tuple[int, int]) -> torch.Tensor:
    """Return values for a whole B [out, r] by its name; with zeros A would get no gradient."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill_b(model: Model, settings: Settings, tensor_rank: int) -> None:
    """Give every B the values of ``made_up_b``, in model and optimizer."""
    size = settings.tensor_model_parallel_size
    with torch.no_grad():
        for chunk in model.chunks:
            stage = unwrap(chunk)
            for local, parameter in stage.named_parameters():
                if local.endswith("lora_b"):
                    name = global_name(stage, local, True)
                    is_cut = getattr(parameter, "tensor_model_parallel", False)
                    rows = parameter.shape[0] * (size if is_cut else 1)
                    whole = made_up_b(name, (rows, parameter.shape[1]))
                    parameter.copy_(
                        cut_shard(name, whole, 0 if is_cut else None, tensor_rank, size)
                    )
    if hasattr(model.optimizer, "reload_model_params"):
        model.optimizer.reload_model_params()


def load_as_a_run_does(settings: Settings, platform, place, model) -> tuple[Progress, list[str]]:
    """Load the newest checkpoint or model of --load; return its progress and the log."""
    logged: list[str] = []
    checkpoints = Checkpoints(
        settings, platform, place, model, coefficient_rule(settings), logged.append
    )
    candidates = find_checkpoints(settings, None, None)
    return checkpoints.load(
        choose_checkpoint(candidates, settings, None, None, logged.append)
    ), logged


def train_adapters(
    settings: Settings, steps: int, first: int = 0, load: str | None = None, save: str | None = None
) -> dict:
    """Train from step ``first`` up to ``steps`` and report on this rank.

    Returns losses, shards of weights and of the first step's gradients, the number of elements with
    a first moment, and of a run that saves also the logits of its exits.
    """
    platform, place, model = start(settings)
    tied = not settings.untie_embeddings_and_output_weights

    def shards(pick):
        return shards_of(model, unwrap, pick, place.tensor_rank, tied)

    logged = []
    if load is None:
        report = {"made": shards(lambda p: p.data)}
        fill_b(model, settings, place.tensor_rank)
    else:
        progress, logged = load_as_a_run_does(
            dataclasses.replace(settings, load=load), platform, place, model
        )
        assert progress.step == first, progress
        report = {}
    report |= {"losses": [], "grad_norms": [], "log": logged, "initial": shards(lambda p: p.data)}
    finalize = model.config.finalize_model_grads_func

    def finalize_and_keep(*args, **kwargs):
        finalize(*args, **kwargs)
        if "gradients" not in report:
            complete_gradients(model, settings)
            report["gradients"] = shards(
                lambda p: p.main_grad if p.requires_grad else torch.zeros_like(p)
            )

    model.config.finalize_model_grads_func = finalize_and_keep
    forward_step, rule = ForwardStep(settings, model, platform), coefficient_rule(settings)
    for step in range(first, steps):
        samples = make_samples(settings.global_batch_size, settings.seq_length, 100 + step)
        batches = micro_batches(samples, settings, place.data_rank, place.data_size)
        use_ranks(model, settings, step)
        result = train_step(
            model,
            settings,
            forward_step,
            batches,
            trained_exits(settings, rule, step),
            settings.global_batch_size,
        )
        report["grad_norms"].append(result.grad_norm)
        report["losses"].append(
            {d: e.loss for d, e in reduce_ledger(forward_step.ledger, settings).exits.items()}
        )
        forward_step.ledger.clear()
    report["names"] = [
        (name, p.requires_grad)
        for chunk in model.chunks
        for name, p in unwrap(chunk).named_parameters()
    ]
    report["state_elements"] = sum(
        value.numel()
        for part in model.optimizer.chained_optimizers
        for entries in part.optimizer.state.values()
        for name, value in entries.items()
        if name == "exp_avg"
    )
    if save is not None:
        report["outcome"] = save_now(
            settings,
            save,
            platform,
            place,
            model,
            Progress(steps, steps * settings.global_batch_size),
        )
    for chunk in model.chunks:
        if settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    report["weights"] = shards(lambda p: p.data)
    if save is not None:
        logits = compute_logits(
            model, settings, platform, make_samples(2, settings.seq_length, 9)["tokens"]
        )
        report["logits"] = (place.tensor_rank, set(), logits)
    return report


def merged(
    parameters: dict[str, torch.Tensor], settings: Settings, rank: int, only_last: bool = False
) -> dict[str, torch.Tensor]:
    """Return the tensors with adapters added: W + (alpha / b) B[:, :b] A[:b] for b = ``rank``."""
    plain = {name: tensor for name, tensor in parameters.items() if not is_adapter(name)}
    for name in [name for name in parameters if name.endswith("lora_a")]:
        target = name.removesuffix("lora_a")
        a, b = parameters[name][:rank], parameters[f"{target}lora_b"][:, :rank]
        if only_last:
            last = torch.arange(rank) == rank - 1
            a, b = torch.where(last[:, None], a, a.detach()), torch.where(last, b, b.detach())
        plain[f"{target}weight"] = plain[f"{target}weight"] + settings.lora_alpha / rank * (b @ a)
    return plain


def reference_adapters(settings: Settings, weights: dict[str, torch.Tensor], steps: int):
    """Return losses, the first step's gradients and norms, and final weights, in plain PyTorch."""
    parameters = {name: weight.clone() for name, weight in weights.items()}
    trained = {
        name: parameters[name].requires_grad_()
        for name in parameters
        if is_adapter(name) or name.startswith(TRAINED_EXIT_PARTS)
    }
    decayed = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )
    losses, norms, gradients, rule = [], [], None, coefficient_rule(settings)
    for step in range(steps):
        samples = make_samples(settings.global_batch_size, settings.seq_length, 100 + step)
        matrices = merged(parameters, settings, rank_at(settings, step), settings.dylora_frozen)
        per_token = exit_losses(
            matrices,
            samples["tokens"],
            samples["labels"],
            samples["mask"],
            None,
            exit_depths(settings),
            settings.num_attention_heads,
            settings.num_query_groups,
            settings.vocab_size,
            settings.norm_epsilon,
        )
        means = {depth: loss.sum() / samples["mask"].sum() for depth, loss in per_token.items()}
        coefficients = trained_exits(settings, rule, step)
        optimizer.zero_grad(set_to_none=False)
        sum(c * means[depth] for depth, c in coefficients.items()).backward()
        for p in trained.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        losses.append({depth: means[depth].item() for depth in coefficients})
        gradients = gradients or {name: p.grad.clone() for name, p in trained.items()}
        norms.append(
            torch.nn.utils.clip_grad_norm_(
                trained.values(), settings.clip_grad or float("inf")
            ).item()
        )
        optimizer.step()
    return losses, norms, gradients, {name: p.detach() for name, p in parameters.items()}
