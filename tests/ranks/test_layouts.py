"""The central test: in every layout losses, gradients and weights equal plain PyTorch."""

import pytest
import torch

from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings
from tests.support.gather import join_ranks
from tests.support.layouts import SANDWICH, pairwise
from tests.support.rank_bodies import train_and_report
from tests.support.ranks import run_ranks
from tests.support.reference import balance_losses, exit_losses
from tests.support.tiny import make_samples, tiny

STEPS = 3


def mean_by_rule(settings: Settings, per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of a masked number per token [b, s], averaged as the settings' loss is."""
    if settings.calculate_per_token_loss:
        return per_token.sum() / mask.sum()
    parts = list(
        zip(
            per_token.split(settings.micro_batch_size),
            mask.split(settings.micro_batch_size),
            strict=True,
        )
    )
    return sum(part.sum() / m.sum() for part, m in parts) / len(
        parts
    )  # the mean of the micro-batches' means


def cross_entropies(
    settings: Settings,
    parameters: dict,
    samples: dict[str, torch.Tensor],
    segments,
    coefficients: dict,
):
    """Return the mean loss of every exit, and the objective of training."""
    routed = []
    per_token = exit_losses(
        parameters,
        samples["tokens"],
        samples["labels"],
        samples["mask"],
        segments,
        exit_depths(settings),
        settings.num_attention_heads,
        settings.num_query_groups,
        settings.vocab_size,
        settings.norm_epsilon,
        settings.moe_router_topk,
        routed,
    )
    means = {d: mean_by_rule(settings, loss, samples["mask"]) for d, loss in per_token.items()}
    objective = sum(c * means[d] for d, c in coefficients.items())
    if settings.moe_aux_loss_coeff:
        balance = balance_losses(routed, settings.micro_batch_size).mean()
        objective = objective + settings.moe_aux_loss_coeff * balance
    return means, objective


def adamw(settings: Settings, trained: dict[str, torch.Tensor]) -> torch.optim.AdamW:
    """Return torch's AdamW for the trained parameters, without weight decay of vectors."""
    decayed = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() == 1]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )


def reference_run(
    settings: Settings,
    weights: dict[str, torch.Tensor],
    steps: int,
    unequal: bool,
    packed: bool,
    coefficients: list[dict],
    objective=cross_entropies,
    make_optimizer=adamw,
):
    """Return each step's losses by depth, the first step's gradients, and the final weights.

    ``objective`` computes what training lowers, from settings, parameters, samples, their segments
    where packed, and coefficients; ``make_optimizer`` returns the optimizer of the settings and
    {name: trained parameter}.
    """
    parameters = {
        name: w.clone().requires_grad_(not settings.tune_exit or name.startswith("exit_"))
        for name, w in weights.items()
    }
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizer = make_optimizer(settings, trained)
    losses, first_gradients = [], None
    for step in range(steps):
        samples = make_samples(
            settings.global_batch_size, settings.seq_length, 100 + step, unequal, packed
        )
        means, objective_now = objective(
            settings,
            parameters,
            samples,
            samples["segments"] if packed else None,
            coefficients[step],
        )
        optimizer.zero_grad(set_to_none=False)
        objective_now.backward()
        for (
            p
        ) in trained.values():  # a parameter above the deepest drawn exit has gradient 0, not none
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        losses.append({d: mean.item() for d, mean in means.items() if d in coefficients[step]})
        if first_gradients is None:
            first_gradients = {name: p.grad.clone() for name, p in trained.items()}
        if settings.clip_grad:
            torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip_grad)
        optimizer.step()
    return losses, first_gradients, {name: p.detach() for name, p in parameters.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the relative difference of two tensors, in norm."""
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def compare(
    world_size: int,
    settings: Settings,
    tolerance: float,
    unequal=False,
    packed=False,
    objective=cross_entropies,
    make_optimizer=adamw,
):
    """Compare a layout with ``reference_run``, and its other arguments; return ranks' reports."""
    reports = run_ranks(world_size, train_and_report, settings, STEPS, unequal, packed)
    initial, _ = join_ranks([r["initial"] for r in reports])
    losses, gradients, weights = reference_run(
        settings,
        initial,
        STEPS,
        unequal,
        packed,
        reports[0]["coefficients"],
        objective,
        make_optimizer,
    )
    rows = settings.vocab_size
    got_gradients, _ = join_ranks([r["gradients"] for r in reports])
    got_weights, _ = join_ranks([r["weights"] for r in reports])
    assert got_gradients.keys() == gradients.keys()
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    for report in reports:
        assert report["grad_norms"][0] == pytest.approx(norm, rel=tolerance), "gradient norm"
        assert report["grad_norms"] == reports[0]["grad_norms"]
    for step, expected in enumerate(losses):
        assert reports[0]["losses"][step].keys() == expected.keys()
        for depth, value in expected.items():
            assert reports[0]["losses"][step][depth] == pytest.approx(value, rel=tolerance), (
                f"loss of exit {depth} at step {step}"
            )
    for name, gradient in gradients.items():
        assert relative(got_gradients[name], gradient) < tolerance, (
            f"gradient of {name}: {relative(got_gradients[name], gradient)}"
        )
    for name, weight in weights.items():
        real = slice(0, rows if "embedding" in name or "output_layer" in name else None)
        difference = relative(got_weights[name][real], weight[real])
        assert difference < tolerance, f"weight {name}: {difference}"
    return reports


# processes, tp, pp, chunks, sequence parallel, recompute, own norm and head, untied, distributed
# optimizer, first/last stage layers
LAYOUTS = {
    "one process": (1, {}),
    "own norms and heads": (1, {"use_exit_norm": True, "untie_exit_output_weights": True}),
    "untied": (1, {"untie_embeddings_and_output_weights": True}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2 sequence parallel untied own": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_exit_norm": True,
            "untie_embeddings_and_output_weights": True,
            "untie_exit_output_weights": True,
        },
    ),
    "dp2": (2, {}),
    "dp2 distributed": (2, {"use_distributed_optimizer": True}),
    "dp2 distributed overlap": (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "dp2 distributed overlap untied own": (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "untie_embeddings_and_output_weights": True,
            "use_exit_norm": True,
            "untie_exit_output_weights": True,
        },
    ),
    "dp2 overlap untied": (
        2,
        {"overlap_grad_reduce": True, "untie_embeddings_and_output_weights": True},
    ),
    "dp2 overlap own": (
        2,
        {"overlap_grad_reduce": True, "use_exit_norm": True, "untie_exit_output_weights": True},
    ),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2 untied": (
        2,
        {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": True},
    ),
    "pp2 own": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "use_exit_norm": True,
            "untie_exit_output_weights": True,
        },
    ),
    "pp2 untied own norm full recompute": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "untie_embeddings_and_output_weights": True,
            "use_exit_norm": True,
            "recompute_granularity": "full",
        },
    ),
    "pp2 uneven first": (
        2,
        {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
    ),
    "pp2 uneven last block recompute": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "decoder_last_pipeline_num_layers": 1,
            "recompute_granularity": "full",
            "recompute_method": "block",
        },
    ),
    "pp2 chunks2": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
    "pp2 chunks2 untied": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "untie_embeddings_and_output_weights": True,
        },
    ),
    "pp2 chunks2 own selective": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "use_exit_norm": True,
            "untie_exit_output_weights": True,
            "recompute_granularity": "selective",
        },
    ),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "pp4 untied full recompute": (
        4,
        {
            "pipeline_model_parallel_size": 4,
            "untie_embeddings_and_output_weights": True,
            "recompute_granularity": "full",
        },
    ),
    "pp4 chunks2 8 layers": (
        4,
        {
            "pipeline_model_parallel_size": 4,
            "num_layers_per_virtual_pipeline_stage": 1,
            "num_layers": 8,
            "exit_layer_nums": (1, 4, 5, 7),
        },
    ),
    "pp4 uneven both": (
        4,
        {
            "pipeline_model_parallel_size": 4,
            "num_layers": 6,
            "decoder_first_pipeline_num_layers": 1,
            "decoder_last_pipeline_num_layers": 1,
            "exit_layer_nums": (1, 3, 5),
        },
    ),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2 pp2 sequence parallel selective untied": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "recompute_granularity": "selective",
            "untie_embeddings_and_output_weights": True,
        },
    ),
    "tp2 pp2 chunks2 sequence parallel full": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "sequence_parallel": True,
            "recompute_granularity": "full",
        },
    ),
    "pp2 dp2 distributed": (
        4,
        {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
    "pp2 dp2 distributed overlap untied": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "untie_embeddings_and_output_weights": True,
        },
    ),
    "pp2 chunks2 dp2 distributed overlap": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "tp2 dp2 distributed sequence parallel own": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            "use_exit_norm": True,
            "untie_exit_output_weights": True,
        },
    ),
    "pp2 layout": (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et*3|tL"},
    ),
    "pp2 layout of unequal chunks": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": "Et|tt|t*3|tL",
            "num_layers": 7,
            "exit_layer_nums": (1, 3, 5),
        },
    ),
    "sandwich": (1, SANDWICH),
    "tp2 sandwich": (2, {"tensor_model_parallel_size": 2, **SANDWICH}),
    "tp2 sequence parallel sandwich full recompute": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "recompute_granularity": "full",
            **SANDWICH,
        },
    ),
    "tp2 pp2 sequence parallel sandwich selective": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "recompute_granularity": "selective",
            "recompute_modules": ("core_attn", "mlp"),
            **SANDWICH,
        },
    ),
    "pp2 chunks2 dp2 distributed sandwich blocks": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "use_exit_block": True,
            **SANDWICH,
        },
    ),
    "tp2 sandwich exit MLPs": (
        2,
        {"tensor_model_parallel_size": 2, "use_exit_mlp": True, **SANDWICH},
    ),
}


@pytest.mark.parametrize("name", pairwise(LAYOUTS, "one process"))
def test_layout_equals_reference(name):
    world_size, changes = LAYOUTS[name]
    compare(world_size, tiny(**changes), 1e-5)


# Text whose documents are kept apart, read from an indexed file by the reader of training data.
TEXT = {
    "one process": (1, {}),
    "tp2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2 chunks2 blocks": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "use_exit_block": True,
        },
    ),
    "fsdp2 full recompute": (2, {"data_parallel": "fsdp", "recompute_granularity": "full"}),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_with_documents_kept_apart(name):
    world_size, changes = TEXT[name]
    compare(world_size, tiny(**changes), 1e-5, packed="text")
