"""What the processes of tests in tests/ranks run. Bodies only: assertions stand in the tests."""

import os

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
    forward_step = ForwardStep(settings, model, platform)
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
    forward_step = ForwardStep(settings, model, platform)
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


def evaluate_report(settings: Settings) -> dict:
    """Returns what evaluation says of every exit on the instruction samples, and this rank's shards of the weights."""
    from megatron_sorted.data.dataset import EvaluationSet
    from megatron_sorted.training.evaluate import evaluate
    from tests.support.tiny import InstructionSource

    platform, place, model = start(settings)
    forward_step = ForwardStep(settings, model, platform)
    likely = make_samples(settings.global_batch_size, settings.seq_length, 79)
    likely["labels"] = torch.full_like(likely["labels"], 7)
    batches = micro_batches(likely, settings, place.data_rank, place.data_size)
    for _ in range(6):  # until label 7 is the most likely one, so that some documents are exactly right
        train_step(model, settings, forward_step, batches, dict.fromkeys((1, 2, 3, 4), 1.0), settings.global_batch_size)
    seen = []
    report = evaluate(model, settings, forward_step, place, "set", EvaluationSet(InstructionSource()), 0,
                      lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == -(-11 // settings.global_batch_size)
    tied = not settings.untie_embeddings_and_output_weights
    weights = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    return {"exits": report.exits, "tokens": report.num_tokens, "weights": weights}


def gpt_model_reads_our_checkpoint(settings: Settings, root: str) -> dict:
    """Saves our model, loads it into Megatron's GPTModel by global names; returns both last losses on the same tokens."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel

    from megatron_sorted.checkpoint.layout import Progress
    from megatron_sorted.checkpoint.sharded import save_checkpoint
    from megatron_sorted.model.spec import layer_spec

    platform, _, model = start(settings)
    directory = save_checkpoint(root, model.chunks, model.optimizer, model.schedule, Progress(1, 1), {}, {})
    theirs = GPTModel(
        model.config, layer_spec(settings, False), settings.vocab_size, settings.seq_length, position_embedding_type="rope",
        share_embeddings_and_output_weights=not settings.untie_embeddings_and_output_weights)
    sharded = theirs.sharded_state_dict()
    loaded, missing, unexpected = dist_checkpointing.load(sharded, str(directory), strict="return_all")
    theirs.load_state_dict(loaded, strict=False)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    positions = torch.arange(settings.seq_length).expand(samples["tokens"].shape)
    with torch.no_grad():
        loss = theirs(samples["tokens"], positions, None, labels=samples["labels"]).mean().item()
    forward_step = ForwardStep(settings, model, platform)
    train_step(model, settings, forward_step, micro_batches(samples, settings, 0, 1), {settings.num_layers: 1.0}, 8)
    ours = reduce_ledger(forward_step.ledger, settings)[settings.num_layers].loss
    differ = {"missing": missing, "unexpected": unexpected}
    extra = ("optimizer", "random_state")  # of the run, not of the model
    named = {what: sorted(n for n in names if not n.startswith(extra) and "_extra_state" not in n) for what, names in differ.items()}
    return {"ours": ours, "theirs": loss, **named}


def segments_against_block(settings: Settings, ends: list[int]) -> dict:
    """Runs a block whole and cut at ``ends``; returns outputs and gradients of both."""
    from megatron_sorted.model.segments import cut_block

    _, _, model = start(settings)
    block = unwrap(model.chunks[0]).decoder
    rotary = unwrap(model.chunks[0]).rotary_pos_emb(settings.seq_length)
    hidden = torch.randn(settings.seq_length, 2, settings.hidden_size, generator=torch.Generator().manual_seed(1))
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
        gradients = {name: parameter.main_grad.clone() for name, parameter in block.named_parameters()}
        results.append((out.detach(), {"input": x.grad, **gradients}))
    (whole, expected), (cut, got) = results
    return {"whole": whole, "cut": cut, "gradients": {name: (expected[name], got[name]) for name in expected}}


def layers_run(settings: Settings, coefficients: dict[int, float]) -> list[int]:
    """Returns the numbers of this rank's layers that one step ran."""
    platform, place, model = start(settings)
    ran = []
    for chunk in model.chunks:
        for layer in unwrap(chunk).decoder.layers:
            layer.register_forward_hook(lambda module, *_: ran.append(module.layer_number))
    forward_step = ForwardStep(settings, model, platform)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    train_step(model, settings, forward_step, micro_batches(samples, settings, place.data_rank, place.data_size), coefficients, 8)
    return sorted(set(ran))


class CollectiveCount:
    """Counts the calls of torch.distributed's functions that data passes through, made inside it."""

    # isend and irecv are left alone: torch compares them with the functions it knows
    NAMES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "batch_isend_irecv")

    def __enter__(self) -> "CollectiveCount":
        self.counts = dict.fromkeys(self.NAMES, 0)
        self._kept = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self._kept.items():
            setattr(dist, name, self._counted(name, function))
        return self

    def _counted(self, name, function):
        def call(*args, **kwargs):
            self.counts[name] += 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)


def batch_checksum(tokens_bs: torch.Tensor) -> int:
    """Returns a number of a micro-batch that is the sum of numbers of its samples."""
    return sum((int(row.sum()) + 1) * 123_456_789 for row in tokens_bs)


def measure(settings: Settings, steps: int, unequal: bool, packed: bool, track: bool = True, finish: bool = True) -> dict:
    """Trains; returns what is measured of the exits at each step and over all, weights before each step, and collectives counted.

    ``finish`` False leaves out all that ``finish_step`` does.
    """
    import dataclasses

    from megatron_sorted.loss.ledger import Ledger
    from megatron_sorted.training.reduce import reduce_interval

    platform, place, model = start(settings)
    tied = not settings.untie_embeddings_and_output_weights
    forward_step = ForwardStep(settings, model, platform, track_agreement=track)
    if not finish:
        forward_step.finish_step = lambda: None
    rule, interval = coefficient_rule(settings), Ledger()
    report = {"steps": [], "weights": [], "coefficients": [], "collectives": [], "bad": []}
    def gather_weights() -> None:
        """Puts on every rank the weights that overlapped gathering would bring with the next forward pass."""
        for chunk in model.chunks if settings.overlap_param_gather else ():
            chunk.start_param_sync(force_sync=True)

    for step in range(steps):
        gather_weights()
        report["weights"].append(shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied))
        samples = make_samples(settings.global_batch_size, settings.seq_length, 100 + step, unequal, packed)
        batches = [dataclasses.replace(batch, checksum=batch_checksum(batch.tokens_bs))
                   for batch in micro_batches(samples, settings, place.data_rank, place.data_size, packed)]
        coefficients = trained_exits(settings, rule, step)
        with CollectiveCount() as collectives:
            train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)
        report["collectives"].append(collectives.counts)
        report["coefficients"].append(coefficients)
        ledger = forward_step.ledger
        report["bad"].append((ledger.bad_exits(), ledger.bad_flag(platform.device()).item()))
        report["steps"].append(reduce_interval(ledger, settings, forward_step.take_checksum(), 1000 + place.rank,
                                               {"data": float(place.rank), "optimizer": 5.0 - place.rank} if step else None))
        interval.merge(ledger)
        ledger.clear()
    report["interval"] = reduce_interval(interval, settings)
    gather_weights()
    report["final"] = shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    return report


def broken_exit(settings: Settings, depth: int) -> dict:
    """Returns what this rank's ledger says of a step in which the own head of the exit at ``depth`` is NaN, and its stage."""
    platform, place, model = start(settings)
    for chunk in model.chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if name == f"exit_output_layers.{depth}.weight":
                parameter.data.fill_(float("nan"))
    forward_step = ForwardStep(settings, model, platform)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    batches = micro_batches(samples, settings, place.data_rank, place.data_size)
    coefficients = trained_exits(settings, coefficient_rule(settings), 0)
    train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)
    ledger = forward_step.ledger
    return {"stage": place.stage, "bad": ledger.bad_exits(), "flag": ledger.bad_flag(platform.device()).item()}


def host_waits(settings: Settings, track: bool, packed: bool) -> dict:
    """Returns where megatron_sorted, and where others, would make the host wait for a device in one step and in a reduction."""
    from megatron_sorted.training.reduce import reduce_interval
    from tests.support.host_waits import HostWaits, MarkedPlatform

    _, place, model = start(settings)
    waits = HostWaits()
    for chunk in model.chunks:
        waits.mark(*(p.data for p in chunk.parameters()), *(p.main_grad for p in chunk.parameters()))
    forward_step = ForwardStep(settings, model, MarkedPlatform(waits), track_agreement=track)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 100, packed, packed)
    batches = micro_batches(samples, settings, place.data_rank, place.data_size, packed)
    coefficients = trained_exits(settings, coefficient_rule(settings), 0)
    train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)  # caches fill
    forward_step.ledger.clear()
    with waits:
        train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)
        flag = forward_step.ledger.bad_flag(forward_step.device)
    step, others = list(waits.found), list(waits.megatrons)
    waits.found.clear()
    with waits:
        reduce_interval(forward_step.ledger, settings)
        bool(flag)
        forward_step.ledger.bad_exits()
    return {"step": step, "megatron": others, "report": list(waits.found)}


def shared_choice(rows: int, vocabulary: int, alike_from: int) -> list[int]:
    """Returns the most likely tokens found by ranks that each hold ``rows`` rows of one output matrix.

    Rows from ``alike_from`` on are alike, and rows before it are 0.
    """
    from megatron_sorted.loss.linear_cross_entropy import VocabularyShard, exit_loss
    from tests.support.loss_case import make_case

    dist.init_process_group("gloo", init_method=init_method(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    first = rows * dist.get_rank()
    case = make_case(rows=rows * dist.get_world_size(), vocabulary=vocabulary)
    case.weight_ph.data[:alike_from], case.weight_ph.data[alike_from:] = 0, case.weight_ph.data[alike_from].clone()
    weight = torch.nn.Parameter(case.weight_ph.data[first : first + rows].clone())
    shard = VocabularyShard(first, max(0, min(rows, vocabulary - first)), dist.group.WORLD)
    return exit_loss(case.hidden_tbh, case.norm, weight, case.targets, shard, 4, None, True)[0].choice_n.tolist()
