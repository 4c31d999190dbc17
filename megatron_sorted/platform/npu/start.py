"""The start of a process that computes on NPUs, before Megatron is imported.

It loads torch_npu, then an adaptor if requested, then applies our patches.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.npu.adaptors import load_adaptor
from megatron_sorted.platform.transformer_engine import check_engine, installed_engine

MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
APPLIED_PATCHES: list[str] = []
"""Names of the patches applied in this process."""


def has_npus() -> bool:
    """Return whether this host has visible NPUs and torch_npu, without loading either."""
    return (
        any(Path("/dev").glob("davinci[0-9]*"))
        and importlib.util.find_spec("torch_npu") is not None
    )


def is_started() -> bool:
    """Return whether this process computes on NPUs."""
    return bool(APPLIED_PATCHES)


def load_torch_npu() -> None:
    """Import torch_npu, which registers NPUs with torch.

    Raises:
        PlatformError: torch_npu or CANN is missing, there is no NPU, or the host also has NVIDIA
            GPUs.
    """
    if "torch_npu" not in sys.modules and torch.cuda.is_available():
        raise PlatformError(
            "--device npu: torch sees NVIDIA GPUs on this host, and a process can use one kind of "
            "accelerator only. Install a CPU build of torch for NPUs, hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= (empty), or use --device cuda."
        )
    if importlib.util.find_spec("torch_npu") is None:
        raise PlatformError(
            "--device npu: torch_npu is not installed. "
            "Install it on the Ascend host with pip install '.[train,npu]'."
        )
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        missing = MISSING_LIBRARY.search(str(error))
        if missing:
            raise PlatformError(
                f"--device npu: torch_npu needs {missing.group(1)}, a library of CANN, "
                "which is not found. Install CANN and run\n"
                "  source /usr/local/Ascend/ascend-toolkit/set_env.sh        "
                "(CANN 9: /usr/local/Ascend/cann/set_env.sh)\n"
                "on every node, in the shell that starts the run."
            ) from error
        raise PlatformError(
            "--device npu: torch_npu cannot be loaded beside torch "
            f"{torch.__version__}: {error}. Its version must be that of torch; see "
            "COMPATIBILITY.md of Ascend/pytorch for the CANN that goes with it."
        ) from error
    if not torch.npu.is_available():
        raise PlatformError(
            "--device npu: CANN sees no NPU. Look at npu-smi info, at ASCEND_RT_VISIBLE_DEVICES, "
            "and whether the job or the container was given devices."
        )


def start_npu(
    adaptor: str = "none",
    adaptor_arguments: str = "",
    leave_out: frozenset[str] = frozenset(),
    coalesced_collectives: bool = True,
) -> None:
    """Make this process compute on NPUs. Calling it again does nothing.

    Args:
        adaptor: Which of ``ADAPTORS`` patches Megatron, or "none".
        adaptor_arguments: Flags for the adaptor, as on a command line.
        leave_out: Names of patches that are not applied, to show what they are for.
        coalesced_collectives: Whether Megatron may coalesce the collectives of several buckets.

    Raises:
        PlatformError: torch_npu, CANN, the adaptor or the NPUs are missing, the host also has
            NVIDIA GPUs, or a ``transformer_engine`` is installed.
    """
    if is_started():
        return
    assert "megatron.core" not in sys.modules, (
        "Megatron was imported before the device was prepared: call load_device first"
    )
    check_engine(installed_engine(), "npu")
    load_torch_npu()
    from megatron_sorted.platform.npu.patches import apply_patches

    if adaptor != "none":
        load_adaptor(adaptor, adaptor_arguments)
    APPLIED_PATCHES.extend(apply_patches(leave_out))
    if not coalesced_collectives:
        from megatron_sorted.platform.npu.collectives import take_collectives_apart

        take_collectives_apart()
