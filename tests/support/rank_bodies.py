"""The work of the processes in tests/ranks; assertions stand in the tests."""

import dataclasses
import os
import resource
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.checkpoint.saver import SaveOutcome
from megatron_sorted.checkpoint.sharding import sharded
from megatron_sorted.model.config import check_platform
from megatron_sorted.parallel.groups import start_process_groups
from megatron_sorted.platform.select import choose_platform
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.checkpoints import Checkpoints, choose_checkpoint
from megatron_sorted.training.run.describe import description
from megatron_sorted.training.step.build import build_model, build_optimizer, unwrap
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.reduce import reduce_ledger
from megatron_sorted.training.step.train_step import train_step
from megatron_sorted.training.watch.watchdog import Watchdog
from tests.support.gather import global_name, rows_by_parameter, shards_of
from tests.support.tiny import init_method, make_samples, micro_batches


def start(settings: Settings):
    """Return platform, place and model of this rank."""
    platform = choose_platform(settings.device)
    platform.prepare()
    check_platform(settings, platform)
    place = start_process_groups(settings, platform, init_method())
    model = build_model(settings, platform, place, settings.vocab_size)
    build_optimizer(model, settings, place.world_size)
    return platform, place, model


def fill_adapters(model) -> None:
    """Give the exits' adapters, which begin as zero, weights with which both matrices learn."""
    for chunk in model.chunks:
        for depth, adapter in unwrap(chunk).exit_adapters.items():
            generator = torch.Generator().manual_seed(int(depth))
            with torch.no_grad():
                adapter.up.weight.copy_(
                    0.1 * torch.randn(adapter.up.weight.shape, generator=generator)
                )


def complete_gradients(model, settings: Settings) -> None:
    """Gather the gradients that the distributed optimizer left as shards on data parallel ranks."""
    if not settings.use_distributed_optimizer:
        return
    for chunk in model.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                gathered = [torch.empty_like(shard) for shard in shards]
                dist.all_gather(gathered, shards[group.rank()].clone(), group=group)
                for shard, full in zip(shards, gathered, strict=True):
                    shard.copy_(full)


def train_and_report(
    settings: Settings,
    steps: int,
    unequal: bool,
    packed: bool,
    snapshot_steps: tuple[int, ...] = (0,),
) -> dict:
    """Train; return losses by step, and this rank's shards of weights and gradients.

    Shards are by global name: of the initial weights, gradients and final weights.
    """
    platform, place, model = start(settings)
    fill_adapters(model)
    tied = not settings.untie_embeddings_and_output_weights
    report = {
        "losses": [],
        "exits": [],
        "grad_norms": [],
        "coefficients": [],
        "initial": shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied),
    }
    finalize = model.config.finalize_model_grads_func

    def finalize_and_keep(*args, **kwargs):
        finalize(*args, **kwargs)
        if "gradients" not in report:
            complete_gradients(model, settings)
            scale = model.optimizer.get_loss_scale().item()
            sharded = rows_by_parameter(model, lambda rows: rows.main_grad)
            report["gradients"] = shards_of(
                model,
                unwrap,
                lambda p: (
                    sharded.get(id(p), getattr(p, "main_grad", None)) / scale
                    if p.requires_grad
                    else None
                ),
                place.tensor_rank,
                tied,
            )

    model.config.finalize_model_grads_func = finalize_and_keep
    forward_step = ForwardStep(settings, model, platform)
    rule = coefficient_rule(settings)
    for step in range(steps):
        samples = make_samples(
            settings.global_batch_size, settings.seq_length, 100 + step, unequal, packed
        )
        batches = micro_batches(samples, settings, place.data_rank, place.data_size, packed)
        coefficients = trained_exits(settings, rule, step)
        result = train_step(
            model, settings, forward_step, batches, coefficients, settings.global_batch_size
        )
        report["coefficients"].append(coefficients)
        report["grad_norms"].append(result.grad_norm)
        report["exits"].append(reduce_ledger(forward_step.ledger, settings).exits)
        report["losses"].append({d: e.loss for d, e in report["exits"][-1].items()})
        forward_step.ledger.clear()
    report["loss_scale"] = model.optimizer.get_loss_scale().item()
    for chunk in model.chunks:
        if settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    report["weights"] = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    return report


def moments(model, settings: Settings) -> dict[str, list]:
    """Return this rank's shards of Adam's moments by name, as without a distributed optimizer.

    With ``--optimizer muon`` Muon's momentum is among them.
    """
    result = {}
    names = ("exp_avg", "exp_avg_sq", *(["momentum_buffer"] * (settings.optimizer == "muon")))
    for moment in names:
        values: dict[int, torch.Tensor] = {}
        for optimizer in model.optimizer.chained_optimizers:
            if settings.use_distributed_optimizer:
                for chunk in model.chunks:
                    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                        if all(buffer is not one for one in optimizer.buffers):
                            continue
                        flat = torch.zeros(buffer.numel)
                        for parameter in buffer.params:
                            start, end, _ = buffer.param_index_map[parameter]
                            if parameter in optimizer.model_param_group_index_map:
                                part = optimizer._get_model_param_range_map(parameter)["param"]
                                state = optimizer._get_main_param_and_optimizer_states(parameter)
                                flat[start + part.start : start + part.end] = state[moment].float()
                        dist.all_reduce(flat, group=buffer.data_parallel_group)
                        for parameter in buffer.params:
                            start, end, _ = buffer.param_index_map[parameter]
                            values[id(parameter)] = flat[start:end].view(parameter.shape)
            elif settings.data_parallel == "fsdp":
                values = rows_by_parameter(
                    model,
                    lambda rows, state=optimizer.optimizer.state, moment=moment: state[rows][
                        moment
                    ],
                )
            else:
                mains = {
                    id(getattr(p, "main_param", p)): id(p)
                    for chunk in model.chunks
                    for p in chunk.parameters()
                }
                for group in optimizer.optimizer.param_groups:
                    for main in group["params"]:
                        values[mains[id(main)]] = optimizer.optimizer.state[main].get(
                            moment
                        )  # sgd has none of Adam's, and Muon other ones
        tied = not settings.untie_embeddings_and_output_weights
        rank = (
            0
            if settings.tensor_model_parallel_size == 1
            else dist.get_rank() % settings.tensor_model_parallel_size
        )
        result[moment] = shards_of(
            model, unwrap, lambda p, values=values: values.get(id(p)), rank, tied
        )
    return result


def parameters_of_parts(settings: Settings) -> dict[str, set[str]]:
    """Return {class of an optimizer: global names of this rank's parameters that it updates}."""
    *_, model = start(settings)
    names = {
        id(parameter): global_name(unwrap(chunk), name, False)
        for chunk in model.chunks
        for name, parameter in unwrap(chunk).named_parameters()
    }
    return {
        type(part.optimizer).__name__: {names[id(p)] for p in part.get_parameters()}
        for part in model.optimizer.chained_optimizers
    }


def save_now(
    settings: Settings, root: str, platform, place, model, progress, meanwhile=lambda: None
) -> SaveOutcome:
    """Save the model into ``root``, call ``meanwhile`` during the save, and return the outcome."""
    settings = dataclasses.replace(settings, save=root)
    checkpoints = Checkpoints(settings, platform, place, model, coefficient_rule(settings), print)
    checkpoints.open_for_saving({}, lambda: None)
    described = description(settings, settings.vocab_size, "test", place, None, None)
    checkpoints.save(progress, described)
    meanwhile()
    outcome = checkpoints.finished(wait=True)
    checkpoints.close()
    return outcome


def steps_with_megatrons_form(settings: Settings, *rest) -> dict:
    """Return ``steps_from`` with optimizer state saved and loaded by Megatron's own functions."""
    sharded.only_part = lambda optimizer: None  # in this process alone
    return steps_from(settings, *rest)


def save_under_faults(
    settings: Settings, root: str, fault: str
) -> tuple[SaveOutcome, SaveOutcome, SaveOutcome, list[str]]:
    """Return the outcomes of three saves, of which the second meets ``fault``, and the log."""
    platform, place, model = start(settings)
    settings, lines = dataclasses.replace(settings, save=root), []
    Path(root).mkdir(exist_ok=True)
    checkpoints = Checkpoints(
        settings, platform, place, model, coefficient_rule(settings), lines.append
    )
    checkpoints.open_for_saving({}, lambda: None)
    described, outcomes = description(settings, settings.vocab_size, "test", place, None, None), []
    ballast, obstacle = Path(root, ".ballast"), Path(root, ".iter_0000002.writing")
    for step in (1, 2, 3):
        dist.barrier()
        if step == 2 and fault == "full disk" and place.rank == 0:
            used = os.statvfs(root)
            ballast.write_bytes(bytes(max(0, used.f_bavail * used.f_frsize - 100_000)))
        if step == 2 and fault == "file in the way" and place.rank == 0:
            obstacle.write_text("")
        if step == 2 and fault == f"file limit on {place.rank}":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        dist.barrier()
        checkpoints.save(Progress(step, 8 * step), described)
        outcomes.append(checkpoints.finished(wait=True))
        checkpoints.report(outcomes[-1], last=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if step == 2 and place.rank == 0:
            ballast.unlink(missing_ok=True)
            if fault == "file in the way":
                obstacle.unlink()
    checkpoints.close()
    return (*outcomes, lines)


def load_now(settings: Settings, root: str, platform, place, model) -> tuple[Progress, list[str]]:
    """Load the newest undamaged checkpoint of ``root``; return its progress and the log."""
    settings, logged = dataclasses.replace(settings, load=root), []
    checkpoints = Checkpoints(
        settings, platform, place, model, coefficient_rule(settings), logged.append
    )
    return checkpoints.load(
        choose_checkpoint(find_candidates(root), settings, None, None, logged.append)
    ), logged


def steps_from(
    settings: Settings,
    root: str,
    load: bool,
    first: int,
    last: int,
    save: bool,
    steps_during_save: int = 0,
) -> dict:
    """Load if asked, train steps first..last-1, save if asked; return losses, weights and moments.

    With ``steps_during_save`` training continues for this many steps during the save.
    """
    platform, place, model = start(settings)
    tied = not settings.untie_embeddings_and_output_weights
    report: dict = {"losses": []}
    if load:
        progress, report["log"] = load_now(settings, root, platform, place, model)
        assert progress == Progress(first, first * settings.global_batch_size)
        report["loaded_moments"] = moments(model, settings)
    report["loaded_weights"] = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    forward_step = ForwardStep(settings, model, platform)
    rule = coefficient_rule(settings)

    def train(step: int):
        samples = make_samples(settings.global_batch_size, settings.seq_length, 100 + step)
        batches = micro_batches(samples, settings, place.data_rank, place.data_size)
        return train_step(
            model,
            settings,
            forward_step,
            batches,
            trained_exits(settings, rule, step),
            settings.global_batch_size,
        )

    for step in range(first, last):
        result = train(step)
        losses = {d: e.loss for d, e in reduce_ledger(forward_step.ledger, settings).exits.items()}
        report["losses"].append((losses, result.grad_norm, model.optimizer.param_groups[0]["lr"]))
    if save:
        progress = Progress(last, last * settings.global_batch_size)
        report["outcome"] = save_now(
            settings,
            root,
            platform,
            place,
            model,
            progress,
            lambda: [train(step) for step in range(last, last + steps_during_save)],
        )
    for chunk in model.chunks:
        if settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    report["weights"] = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    report["moments"] = moments(model, settings)
    return report


def evaluate_report(settings: Settings) -> dict:
    """Return the evaluation of exits on instruction samples, and this rank's weight shards."""
    from megatron_sorted.data.samples.dataset import EvaluationSet
    from megatron_sorted.training.run.evaluate import Evaluator
    from tests.support.tiny import InstructionSource

    platform, place, model = start(settings)
    forward_step = ForwardStep(settings, model, platform)
    likely = make_samples(settings.global_batch_size, settings.seq_length, 79)
    likely["labels"] = torch.full_like(likely["labels"], 7)
    batches = micro_batches(likely, settings, place.data_rank, place.data_size)
    for _ in range(
        6
    ):  # until label 7 is the most likely one, so that some documents are exactly right
        train_step(
            model,
            settings,
            forward_step,
            batches,
            dict.fromkeys((1, 2, 3, 4), 1.0),
            settings.global_batch_size,
        )
    seen = []
    evaluation = Evaluator(
        settings, model, platform, place, "set", EvaluationSet(InstructionSource())
    )
    report = evaluation.run(0, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == -(-11 // settings.global_batch_size)
    tied = not settings.untie_embeddings_and_output_weights
    weights = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    return {"exits": report.exits, "tokens": report.num_tokens, "weights": weights}


def gpt_model_reads_our_checkpoint(settings: Settings, root: str) -> dict:
    """Save our model, load it into Megatron's GPTModel by name; return both losses on one batch."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel

    from megatron_sorted.model.spec import layer_spec

    platform, place, model = start(settings)
    directory = save_now(settings, root, platform, place, model, Progress(1, 1)).directory
    theirs = GPTModel(
        model.config,
        layer_spec(settings, False),
        settings.vocab_size,
        settings.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not settings.untie_embeddings_and_output_weights,
    )
    sharded = theirs.sharded_state_dict()
    loaded, missing, unexpected = dist_checkpointing.load(
        sharded, str(directory), strict="return_all"
    )
    theirs.load_state_dict(loaded, strict=False)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    positions = torch.arange(settings.seq_length).expand(samples["tokens"].shape)
    with torch.no_grad():
        loss = theirs(samples["tokens"], positions, None, labels=samples["labels"]).mean().item()
    forward_step = ForwardStep(settings, model, platform)
    train_step(
        model,
        settings,
        forward_step,
        micro_batches(samples, settings, 0, 1),
        {settings.num_layers: 1.0},
        8,
    )
    ours = reduce_ledger(forward_step.ledger, settings).exits[settings.num_layers].loss
    differ = {"missing": missing, "unexpected": unexpected}
    extra = ("optimizer", "random_state")  # of the run, not of the model
    named = {
        what: sorted(n for n in names if not n.startswith(extra) and "_extra_state" not in n)
        for what, names in differ.items()
    }
    return {"ours": ours, "theirs": loss, **named}


def segments_against_block(settings: Settings, ends: list[int]) -> dict:
    """Run a block whole and cut at ``ends``; return outputs and gradients of both."""
    from megatron_sorted.model.chunk import cut_block

    _, _, model = start(settings)
    block = unwrap(model.chunks[0]).decoder
    rotary = unwrap(model.chunks[0]).rotary_pos_emb(settings.seq_length)
    hidden = torch.randn(
        settings.seq_length, 2, settings.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    results = []
    for segments in ((block,), cut_block(block, ends)):
        block.zero_grad()
        for parameter in block.parameters():
            parameter.main_grad.zero_()
        x = hidden.clone().requires_grad_()
        out = x
        for segment in segments:
            out = segment(hidden_states=out, attention_mask=None, rotary_pos_emb=rotary)
        (out * hidden).sum().backward()
        gradients = {
            name: parameter.main_grad.clone() for name, parameter in block.named_parameters()
        }
        results.append((out.detach(), {"input": x.grad, **gradients}))
    (whole, expected), (cut, got) = results
    return {
        "whole": whole,
        "cut": cut,
        "gradients": {name: (expected[name], got[name]) for name in expected},
    }


def layers_run(settings: Settings, coefficients: dict[int, float]) -> list[int]:
    """Return the numbers of this rank's layers that one step ran."""
    platform, place, model = start(settings)
    ran = []
    for chunk in model.chunks:
        for layer in unwrap(chunk).decoder.layers:
            layer.register_forward_hook(lambda module, *_: ran.append(module.layer_number))
    forward_step = ForwardStep(settings, model, platform)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    train_step(
        model,
        settings,
        forward_step,
        micro_batches(samples, settings, place.data_rank, place.data_size),
        coefficients,
        8,
    )
    return sorted(set(ran))


def train_with_poison(
    settings: Settings, poisoned: dict[int, tuple[int, int, str]], steps: list[int]
) -> dict:
    """Train on the data of ``steps``; return results and final weights.

    ``poisoned`` maps steps to (rank, depth, what): that rank's exit has a loss of NaN, or an
    infinite gradient.
    """
    platform, place, model = start(settings)
    forward_step = ForwardStep(settings, model, platform)
    honest = forward_step.losses.compute
    results = []
    for step in steps:
        rank, depth, what = poisoned.get(step, (-1, -1, ""))

        def exit_loss(micro, at, hidden, factor, rank=rank, depth=depth, what=what):
            losses, gradient = honest(micro, at, hidden, factor)
            if place.rank == rank and at == depth:
                (losses.loss_n if what == "loss" else gradient).view(-1)[0] = (
                    float("nan") if what == "loss" else float("inf")
                )
            return losses, gradient

        forward_step.losses.compute = exit_loss
        samples = make_samples(settings.global_batch_size, settings.seq_length, 100 + step)
        batches = micro_batches(samples, settings, place.data_rank, place.data_size)
        coefficients = trained_exits(settings, coefficient_rule(settings), step)
        results.append(
            train_step(
                model, settings, forward_step, batches, coefficients, settings.global_batch_size
            )
        )
    tied = not settings.untie_embeddings_and_output_weights
    return {
        "results": results,
        "rate": model.optimizer.param_groups[0]["lr"],
        "weights": shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied),
        "moments": moments(model, settings),
    }


def hang_somewhere(settings: Settings, hanging_rank: int) -> dict[str, object]:
    """Return the report of this rank's watchdog when one rank sleeps and the others wait for it."""
    platform = choose_platform(settings.device)
    platform.prepare()
    place = start_process_groups(settings, platform, init_method())
    report, over = {}, threading.Event()

    def on_hang(error, silent):
        if not report:  # in a run this call does not come back
            report.update(error=str(error), silent=silent)
        over.set()

    watchdog = Watchdog(1.0, on_hang)
    watchdog.start()
    watchdog.mark("step 6, forward and backward")
    watchdog.mark("step 7, data")
    if place.rank == hanging_rank:
        over.wait(30)
        time.sleep(1)  # until the others have decided too
    else:
        watchdog.mark("step 7, forward and backward")
    dist.barrier()
    watchdog.stop()
    return report
