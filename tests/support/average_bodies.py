"""The work of the processes in tests/ranks/test_weight_average.py."""

import torch
import torch.distributed as dist

from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.averaging import make_average
from megatron_sorted.training.run.checkpoints import Checkpoints, choose_checkpoint
from megatron_sorted.training.run.describe import description
from megatron_sorted.training.step.build import unwrap
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.train_step import train_step
from megatron_sorted.training.step_result import Flags, TrainedStep
from tests.support.gather import rows_by_parameter, shards_of
from tests.support.rank_bodies import fill_adapters, start
from tests.support.tiny import make_samples, micro_batches


def fp32_weights(model, settings: Settings) -> dict[str, list]:
    """Return this rank's shards of its fp32 weights, by name, as without a distributed optimizer.

    Collective: with the distributed optimizer, an all-reduce of each buffer over its group.
    """
    values: dict[int, torch.Tensor] = {}
    for part in model.optimizer.chained_optimizers if settings.use_distributed_optimizer else ():
        for buffer in part.buffers:
            flat = torch.zeros(buffer.numel)
            for parameter in buffer.params:
                if parameter in part.model_param_group_index_map:
                    begin, *_ = buffer.param_index_map[parameter]
                    own = part._get_model_param_range_map(parameter)["param"]
                    group, place = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[group]["params"][place]
                    flat[begin + own.start : begin + own.end] = main.detach().view(-1)
            dist.all_reduce(flat, group=buffer.data_parallel_group)
            for parameter in buffer.params:
                begin, end, _ = buffer.param_index_map[parameter]
                values[id(parameter)] = flat[begin:end].view(parameter.shape)
    values |= rows_by_parameter(model, lambda rows: rows)
    tied = not settings.untie_embeddings_and_output_weights
    rank = dist.get_rank() % settings.tensor_model_parallel_size

    def pick(parameter):
        main = getattr(parameter, "main_param", None)
        return values.get(id(parameter), (parameter if main is None else main).data)

    return shards_of(model, unwrap, pick, rank, tied)


def model_weights(model, settings: Settings, rank: int) -> dict[str, list]:
    """Return this rank's shards of the weights that its layers read, by name."""
    whole = rows_by_parameter(model, lambda rows: rows)
    tied = not settings.untie_embeddings_and_output_weights
    return shards_of(model, unwrap, lambda p: whole.get(id(p), p.data), rank, tied)


def averaged_steps(
    settings: Settings, root: str, load: bool, first: int, last: int, save: bool
) -> dict:
    """Train steps first..last-1 with an average; return weights of each step and the average.

    Returns:
        "steps": {number of a step: fp32 weights after it}; "averaged": fp32 weights while the
        average is in place, "in_layers" those that the layers read then; "loaded" the average right
        after loading; "back" the fp32 weights after that, and "back_in_layers".
    """
    platform, place, model = start(settings)
    if not load:
        fill_adapters(model)
    average, rule = make_average(settings, model), coefficient_rule(settings)
    checkpoints = Checkpoints(settings, platform, place, model, rule, print, average)
    report: dict = {"steps": {}, "bytes": sum(t.numel() * 4 for t in average.tensors)}
    if load:
        candidate = choose_checkpoint(find_candidates(root), settings, None, None, print)
        checkpoints.load(candidate)
        report["loaded"] = _averaged(average, model, settings)
    forward_step = ForwardStep(settings, model, platform)
    for step in range(first, last):
        samples = make_samples(settings.global_batch_size, settings.seq_length, 100 + step)
        batches = micro_batches(samples, settings, place.data_rank, place.data_size)
        coefficients = trained_exits(settings, rule, step)
        result = train_step(
            model, settings, forward_step, batches, coefficients, settings.global_batch_size
        )
        average.after(TrainedStep(step + 1, 0, result, False, False, Flags()))
        report["steps"][step + 1] = fp32_weights(model, settings)
    if save:
        checkpoints.open_for_saving({}, lambda: None)
        described = description(settings, settings.vocab_size, "test", place, None, None)
        checkpoints.save(Progress(last, last * settings.global_batch_size), described)
        outcome = checkpoints.finished(wait=True)
        assert outcome.error is None, outcome.error
    if average.has_begun:
        with average.in_place():
            report["averaged"] = fp32_weights(model, settings)
            report["in_layers"] = model_weights(model, settings, place.tensor_rank)
    report["back"] = fp32_weights(model, settings)
    report["back_in_layers"] = model_weights(model, settings, place.tensor_rank)
    checkpoints.close()
    return report


def _averaged(average, model, settings: Settings) -> dict[str, list] | None:
    if not average.has_begun:
        return None
    with average.in_place():
        return fp32_weights(model, settings)
