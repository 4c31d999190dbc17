"""What the processes of tests in tests/ranks run. Bodies only: assertions stand in the tests."""

import torch
import torch.distributed as dist

from megatron_sorted.parallel.groups import start_process_groups
from megatron_sorted.platform.select import choose_platform
from megatron_sorted.settings.derived import coefficient_rule, trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.build import build_model, build_optimizer, unwrap
from megatron_sorted.training.forward_step import ForwardStep
from megatron_sorted.training.reduce import reduce_ledger
from megatron_sorted.training.step import train_step
from tests.support.gather import shards_of
from tests.support.tiny import init_method, make_samples, micro_batches


def start(settings: Settings):
    """Returns platform, place and model of this rank."""
    platform = choose_platform(settings.device)
    platform.prepare()
    place = start_process_groups(settings, platform, init_method())
    model = build_model(settings, platform, place, settings.vocab_size)
    build_optimizer(model, settings, place.world_size)
    return platform, place, model


def complete_gradients(model, settings: Settings) -> None:
    """Puts every gradient on every data parallel rank, where the distributed optimizer left each only its shard."""
    if not settings.use_distributed_optimizer:
        return
    for chunk in model.chunks:
        for buffer in chunk.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                gathered = [torch.empty_like(shard) for shard in shards]
                dist.all_gather(gathered, shards[group.rank()].clone(), group=group)
                for shard, full in zip(shards, gathered, strict=True):
                    shard.copy_(full)


def train_and_report(settings: Settings, steps: int, unequal: bool, packed: bool, snapshot_steps: tuple[int, ...] = (0,)) -> dict:
    """Trains; returns losses by step, and by global name this rank's shards of the initial weights, gradients and final weights."""
    platform, place, model = start(settings)
    tied = not settings.untie_embeddings_and_output_weights
    report = {"losses": [], "grad_norms": [], "coefficients": [],
              "initial": shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)}
    finalize = model.config.finalize_model_grads_func

    def finalize_and_keep(*args, **kwargs):
        finalize(*args, **kwargs)
        if "gradients" not in report:
            complete_gradients(model, settings)
            scale = model.optimizer.get_loss_scale().item()
            report["gradients"] = shards_of(model, unwrap, lambda p: p.main_grad / scale, place.tensor_rank, tied)

    model.config.finalize_model_grads_func = finalize_and_keep
    forward_step = ForwardStep(settings, model, platform.device(), settings.exit_loss_chunk_tokens)
    rule = coefficient_rule(settings)
    for step in range(steps):
        samples = make_samples(settings.global_batch_size, settings.seq_length, 100 + step, unequal, packed)
        batches = micro_batches(samples, settings, place.data_rank, place.data_size, packed)
        coefficients = trained_exits(settings, rule, step)
        result = train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)
        report["coefficients"].append(coefficients)
        report["grad_norms"].append(result.grad_norm)
        report["losses"].append({d: e.loss for d, e in reduce_ledger(forward_step.ledger, settings).items()})
        forward_step.ledger.clear()
    report["loss_scale"] = model.optimizer.get_loss_scale().item()
    for chunk in model.chunks:
        if settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    report["weights"] = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    return report


def moments(model, settings: Settings) -> dict[str, list]:
    """Returns this rank's shards of Adam's moments by name; the distributed optimizer's are gathered over data ranks first."""
    result = {}
    for moment in ("exp_avg", "exp_avg_sq"):
        values: dict[int, torch.Tensor] = {}
        for optimizer in model.optimizer.chained_optimizers:
            if settings.use_distributed_optimizer:
                for chunk in model.chunks:
                    for buffer in chunk.buffers:
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
            else:
                mains = {id(getattr(p, "main_param", p)): id(p) for chunk in model.chunks for p in chunk.parameters()}
                for group in optimizer.optimizer.param_groups:
                    for main in group["params"]:
                        values[mains[id(main)]] = optimizer.optimizer.state[main][moment]
        tied = not settings.untie_embeddings_and_output_weights
        rank = 0 if settings.tensor_model_parallel_size == 1 else dist.get_rank() % settings.tensor_model_parallel_size
        result[moment] = shards_of(model, unwrap, lambda p, values=values: values[id(p)], rank, tied)
    return result


def steps_from(settings: Settings, root: str, load: bool, first: int, last: int, save: bool) -> dict:
    """Loads if asked, trains steps first..last-1, saves if asked; returns losses, weights and moments."""
    from megatron_sorted.checkpoint.layout import Progress, latest_checkpoint
    from megatron_sorted.checkpoint.sharded import load_checkpoint, save_checkpoint

    platform, place, model = start(settings)
    tied = not settings.untie_embeddings_and_output_weights
    if load:
        progress, more = load_checkpoint(latest_checkpoint(root), model.chunks, model.optimizer, model.schedule, True, True)
        assert progress == Progress(first, first * settings.global_batch_size) and more == {"note": first}
    report = {"losses": [], "loaded_weights": shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)}
    if load:
        report["loaded_moments"] = moments(model, settings)
    forward_step = ForwardStep(settings, model, platform.device(), settings.exit_loss_chunk_tokens)
    rule = coefficient_rule(settings)
    for step in range(first, last):
        samples = make_samples(settings.global_batch_size, settings.seq_length, 100 + step)
        batches = micro_batches(samples, settings, place.data_rank, place.data_size)
        result = train_step(model, settings, forward_step, batches, trained_exits(settings, rule, step), settings.global_batch_size)
        losses = {d: e.loss for d, e in reduce_ledger(forward_step.ledger, settings).items()}
        report["losses"].append((losses, result.grad_norm, model.optimizer.param_groups[0]["lr"]))
        forward_step.ledger.clear()
    report["weights"] = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    report["moments"] = moments(model, settings)
    if save:
        description = {"shape": {}, "settings": {}}
        save_checkpoint(root, model.chunks, model.optimizer, model.schedule, Progress(last, last * settings.global_batch_size),
                        description, {"note": last})
    return report
