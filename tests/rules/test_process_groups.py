"""Every call of Megatron that takes a process group is given it, in the installed version."""

import pytest

from tests.rules.process_groups import COLLECTIVES, Source
from tests.rules.sources import name_of, program_files

EXCEPTIONS = {
    ("initialize_model_parallel", "sharp_enabled_group"): (
        "the kind of group that a switch of InfiniBand sums for, by name; none"
    ),
    ("get_forward_backward_func", "schedule_pg_collection"): (
        "0.19: for pipelines of several networks; for one network the sizes choose the schedule"
    ),
}
"""(function, parameter) that calls leave out -> reason."""
ONE_GROUP = "megatron_sorted/doctor/"
"""Programs that start before Megatron, where the group of all processes is the only one."""

IMPORTS = """
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron_sorted.model.lora import AdaptedRowParallelLinear
from megatron_sorted.model.rotary import make_rotary
from megatron_sorted.platform.versions import known_arguments
"""
CALLS = {
    "DistributedDataParallel(config, ddp, chunk)": {"pg_collection"},
    "DistributedDataParallel(config, ddp, chunk, pg_collection=groups)": set(),
    "DistributedDataParallel(config, ddp, chunk, False, groups)": set(),
    "get_batch_on_this_cp_rank(batch, **known_arguments(f, is_hybrid_cp=False))": {"cp_group"},
    "get_batch_on_this_cp_rank(batch, **known_arguments(f, cp_group=group))": set(),
    "get_forward_backward_func()": {"pp_size", "vp_size"},
    "get_forward_backward_func(2, None)": set(),
    "tensor_parallel.ColumnParallelLinear(1, 2, config=c, init_method=i)": {"tp_group"},
    "tensor_parallel.model_parallel_cuda_manual_seed(1)": {"tp_rank", "ep_rank", "etp_rank"},
    "build_module(spec, config=config)": {"pg_collection"},
    "AdaptedRowParallelLinear(1, 2, adapter=adapter)": {"tp_group"},
    "get_megatron_optimizer(config, chunks, **some())": {"pg_collection"},
    "make_rotary(settings, groups)": set(),
    "unknown(1)": set(),
}


def omitted(source: str) -> set[str]:
    """Return the parameters that calls of a source leave out, without the exceptions."""
    return {
        one.parameter
        for one in Source(IMPORTS + source).omissions()
        if (one.function, one.parameter) not in EXCEPTIONS
    }


@pytest.mark.parametrize("call", CALLS)
def test_calls_without_their_group_are_reported(call):
    assert omitted(call) == CALLS[call]


OTHERS = {
    "the returned schedule": (
        "def f():\n    run = get_forward_backward_func(1, None)\n    run(forward_step_func=g)",
        {"p2p_communicator", "pg_collection"},
    ),
    "the returned schedule, at once": (
        "get_forward_backward_func(1, None)(forward_step_func=g, pg_collection=groups)",
        {"p2p_communicator"},
    ),
    "a module of Megatron's that is kept": (
        "class A:\n    def f(self):\n        self.r = make_rotary(s, groups)\n"
        "    def g(self):\n        self.r(4)",
        {"cp_group"},
    ),
    "a module that is given the group": (
        "class A:\n    def f(self):\n        self.r = make_rotary(s, groups)\n"
        "    def g(self):\n        self.r(4, cp_group=group)",
        set(),
    ),
    "a subclass": (
        "class A(RowParallelLinear):\n    def __init__(self):\n        super().__init__(1, 2)",
        {"tp_group"},
    ),
    "a subclass that passes its arguments on": (
        "class A(RowParallelLinear):\n    def __init__(self, *a, **b):\n"
        "        super().__init__(*a, **b)",
        set(),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_indirect_calls_are_reported(case):
    source, expected = OTHERS[case]
    assert omitted(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("dist.all_reduce(x)", {"all_reduce"}),
        ("dist.all_reduce(x, group=group)", set()),
        ("dist.broadcast(x, 0, group)", set()),
        ("torch.distributed.barrier()", {"barrier"}),
        ("dist.get_rank()", set()),
    ],
)
def test_collectives_without_their_group_are_reported(source, expected):
    assert {one.function for one in Source(source).collectives_without_group()} == expected


def test_collectives_are_known():
    assert {"all_reduce", "all_gather_object", "barrier", "broadcast_object_list"} <= COLLECTIVES


def test_every_call_of_megatron_names_its_groups():
    sources = {path: Source(path.read_text(encoding="utf-8")) for path in program_files()}
    judged = {
        path: list(source.omissions())
        for path, source in sources.items()
        if source.imports_megatron
    }
    assert len(judged) > 30, "the rule reads the sources that import Megatron"
    left = [
        f"{name_of(path)}:{one.line}: {one.function} without {one.parameter}"
        for path, omissions in judged.items()
        for one in omissions
        if (one.function, one.parameter) not in EXCEPTIONS
    ]
    assert not left, "give each its group, from megatron_sorted.parallel.groups.process_groups"


def test_every_collective_names_its_group():
    left = [
        f"{name_of(path)}:{one.line}: dist.{one.function} without group"
        for path in program_files()
        if name_of(path).startswith("megatron_sorted/") and not name_of(path).startswith(ONE_GROUP)
        for one in Source(path.read_text(encoding="utf-8")).collectives_without_group()
    ]
    assert not left, "name it; group=dist.group.WORLD where all processes are meant"
