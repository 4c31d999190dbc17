"""Imports libraries and says as JSON what they are: a process of its own, since an import may fail, crash or hang.

python -m megatron_sorted.doctor.devices.probe torch megatron
"""

import contextlib
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any


def torch_facts() -> dict[str, Any]:
    """Return what torch was built for and sees."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "file": torch.__file__,
        "cuda": torch.version.cuda,
        "distributed": torch.distributed.is_available(),
        "devices": [],
    }
    if facts["distributed"]:
        facts["gloo"] = torch.distributed.is_gloo_available()
        facts["nccl"] = torch.distributed.is_nccl_available()
    if torch.cuda.is_available():
        facts["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["architectures"] = torch.cuda.get_arch_list()
        facts.update(_device_facts(torch, torch.cuda, "cuda"))
        facts["capabilities"] = [
            list(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())
        ]
    elif torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except Exception as error:
            facts["device_error"] = str(error)
    return facts


def npu_facts() -> dict[str, Any]:
    """Return what torch_npu sees."""
    import torch
    import torch_npu

    facts = _device_facts(torch, torch.npu, "npu") if torch.npu.is_available() else {"devices": []}
    return {"version": torch_npu.__version__, **facts}


def _device_facts(torch: Any, module: Any, kind: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "devices": [module.get_device_name(index) for index in range(module.device_count())]
    }
    try:
        total = (torch.ones(8, device=f"{kind}:0") * 3).sum().item()
        if total != 24:
            facts["device_error"] = f"3 x 8 ones summed to {total}"
    except Exception as error:
        facts["device_error"] = str(error)
    return facts


def megatron_facts() -> dict[str, Any]:
    """Import megatron-core; its version is read from its files."""
    from megatron.core import parallel_state  # noqa: F401

    return {}


def transformer_engine_facts() -> dict[str, Any]:
    """Return which Transformer Engine is imported."""
    import transformer_engine
    import transformer_engine.pytorch

    return {"version": getattr(transformer_engine, "__version__", "unknown")}


def apex_facts() -> dict[str, Any]:
    """Return which Apex is imported, and which of the kernels that megatron-core takes it was built without."""
    import apex

    missing = []
    for name in ("amp_C", "fused_layer_norm_cuda", "apex.optimizers"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    return {"version": getattr(apex, "__version__", "unknown"), "missing": missing}


FACTS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_facts,
    "torch_npu": npu_facts,
    "megatron": megatron_facts,
    "transformer_engine": transformer_engine_facts,
    "apex": apex_facts,
}


def main(*names: str) -> None:
    """Print one line of JSON for each library: the facts, or the error with those that caused it."""
    warnings.simplefilter("ignore")
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answer = {"facts": FACTS[name]()}
        except BaseException as error:  # also SystemExit of a library
            causes, cause = [], error
            while cause is not None:
                causes.append(f"{type(cause).__name__}: {cause}")
                cause = cause.__cause__ or cause.__context__
            answer = {"errors": causes}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
