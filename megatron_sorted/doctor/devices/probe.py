"""Imports libraries and prints as JSON what they are, in a process of its own.

An import may fail, crash or hang. Usage:
``python -m megatron_sorted.doctor.devices.probe torch megatron``.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any


def torch_facts() -> dict[str, Any]:
    """Return torch's version, what it was built for, and its GPUs."""
    import torch

    has_gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    facts = {
        "version": torch.__version__,
        "file": torch.__file__,
        "cuda": torch.version.cuda,
        "gloo": has_gloo,
        "devices": [],
    }
    if torch.cuda.is_available():
        has_nccl = has_gloo and torch.distributed.is_nccl_available()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None
        facts["capabilities"] = [
            list(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())
        ]
        facts |= _device_facts(torch, torch.cuda, "cuda")
    elif torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except Exception as error:  # a broken driver raises anything
            facts["device_error"] = str(error)
    return facts


def npu_facts() -> dict[str, Any]:
    """Return torch_npu's version and its NPUs."""
    import torch
    import torch_npu

    facts = _device_facts(torch, torch.npu, "npu") if torch.npu.is_available() else {"devices": []}
    return {"version": torch_npu.__version__, **facts}


def _device_facts(torch: Any, module: Any, kind: str) -> dict[str, Any]:
    """Return the names of all devices of a kind; compute on the first one."""
    facts: dict[str, Any] = {
        "devices": [module.get_device_name(index) for index in range(module.device_count())]
    }
    try:
        total = (torch.ones(8, device=f"{kind}:0") * 3).sum().item()
        if total != 24:
            facts["device_error"] = f"3 x 8 ones summed to {total}"
    except Exception as error:  # a broken driver raises anything
        facts["device_error"] = str(error)
    return facts


def megatron_facts() -> dict[str, Any]:
    """Import megatron-core; its version is read from its files.

    Return the names that it lacks.
    """
    from megatron.core import parallel_state  # noqa: F401

    from megatron_sorted.platform.megatron_names import missing_names

    return {"missing": missing_names()}


def transformer_engine_facts() -> dict[str, Any]:
    """Return the version of Transformer Engine."""
    import transformer_engine
    import transformer_engine.pytorch

    return {"version": getattr(transformer_engine, "__version__", "unknown")}


FACTS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_facts,
    "torch_npu": npu_facts,
    "megatron": megatron_facts,
    "transformer_engine": transformer_engine_facts,
}


def main(*names: str) -> None:
    """Print one line of JSON for each library: its facts, or the error with its causes."""
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
