"""CUDA calls redirected to the CPU, in a separate process, because redirections outlast a test."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.cpu import FACTORIES, CpuPlatform
from megatron_sorted.platform.cuda import CudaPlatform
from megatron_sorted.platform.select import choose_platform
from tests.support.ranks import run_ranks

ARGUMENTS = {
    "arange": (3,),
    "as_tensor": ([1.0],),
    "empty_strided": ((2,), (1,)),
    "full": ((2,), 1.0),
    "randint": (5, (2,)),
    "tensor": ([1.0],),
}


def redirected() -> dict:
    """Return what a redirected process sees."""
    CpuPlatform().prepare()
    CpuPlatform().prepare()  # a second time changes nothing
    seen = {}
    like = torch.zeros(2)
    for name in FACTORIES:
        arguments = (like,) if name.endswith("_like") else ARGUMENTS.get(name, (2,))
        for device in (
            "cuda",
            torch.device("cuda", 0),
            0,
            torch.cuda.current_device(),
            "cpu",
            None,
        ):
            seen[f"{name} {device!r}"] = getattr(torch, name)(*arguments, device=device).device.type
    meta = torch.empty(2, device="meta")
    seen["meta"] = meta.device.type
    seen["types"] = [
        torch.zeros(1, dtype=kind).type() for kind in (torch.float32, torch.bfloat16, torch.float16)
    ]
    seen["cast"] = (
        torch.zeros(1).type(torch.int64).dtype,
        torch.zeros(1).type("torch.DoubleTensor").dtype,
    )
    seen["same"] = like.cuda() is like and like.cuda(0) is like
    module = torch.nn.Linear(1, 1)
    seen["module"] = module.cuda() is module
    return seen


def tracker_forks() -> dict:
    """Return numbers drawn inside and outside Megatron's tracker of random states."""
    from megatron.core import tensor_parallel

    from megatron_sorted.platform.state import random_state, random_tracker, set_random_state

    CpuPlatform().prepare()
    torch.manual_seed(1)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("shards", 2)
    assert tracker is random_tracker()
    outside = [torch.rand(1).item()]
    with tracker.fork("shards"):
        inside = [torch.rand(1).item()]
    outside.append(torch.rand(1).item())
    state = random_state()
    with tracker.fork("shards"):
        inside.append(torch.rand(1).item())
    outside.append(torch.rand(1).item())
    set_random_state(state)
    with tracker.fork("shards"):
        again = torch.rand(1).item()
    return {"outside": outside, "inside": inside, "again": (again, torch.rand(1).item())}


def test_factories_types_and_moves_stay_on_the_cpu():
    [seen] = run_ranks(1, redirected)
    assert seen.pop("meta") == "meta"
    assert seen.pop("types") == [
        "torch.cuda.FloatTensor",
        "torch.cuda.BFloat16Tensor",
        "torch.cuda.HalfTensor",
    ]
    assert seen.pop("cast") == (torch.int64, torch.float64)
    assert seen.pop("same") and seen.pop("module")
    assert len(seen) >= 5 * len(FACTORIES) and set(seen.values()) == {"cpu"}, seen


def test_random_states_fork():
    [drawn] = run_ranks(1, tracker_forks)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    outside, inside = ([torch.rand(1, generator=g).item() for _ in range(3)] for g in generators)
    assert drawn["outside"] == outside and drawn["inside"] == inside[:2]
    assert drawn["again"] == (inside[1], outside[2])


def test_peak_memory_is_measured_anew():
    platform = CpuPlatform()
    platform.reset_peak_memory()
    before = platform.peak_memory_bytes()
    assert torch.ones(64 << 20, dtype=torch.uint8)[-1] == 1
    assert 60 << 20 < platform.peak_memory_bytes() - before < 300 << 20
    platform.reset_peak_memory()
    assert platform.peak_memory_bytes() < before + (32 << 20)


def test_platforms_by_name():
    assert (
        type(choose_platform("cpu")) is CpuPlatform
        and type(choose_platform("cuda")) is CudaPlatform
    )
    with pytest.raises(PlatformError) as error:
        choose_platform("tpu")
    assert str(error.value) == "--device tpu: no such platform. Use one of: auto, cpu, cuda, npu."


def without_gpu() -> tuple[str, str]:
    """Return the platform that "auto" chooses, and the refusal of an explicit one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with pytest.raises(PlatformError) as error:
        choose_platform("cuda").prepare()
    return choose_platform("auto").name, str(error.value)


def test_no_gpu_is_a_sentence():
    assert run_ranks(1, without_gpu) == [
        (
            "cpu",
            "--device cuda: torch sees no GPU on this host. "
            "Install a CUDA build of torch, or use --device cpu.",
        )
    ]


def test_a_start_on_a_cpu_loads_neither_compiler_nor_wandb():
    code = (
        "import sys; from types import SimpleNamespace; "
        "from megatron_sorted.platform.select import load_device; "
        "load_device(SimpleNamespace(device='cpu')); import megatron_sorted.training.run.loop; "
        "print(sorted(name for name in ('torch._dynamo', 'torch._inductor', 'wandb') "
        "if sys.modules.get(name)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
