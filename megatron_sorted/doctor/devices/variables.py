"""Environment variables that slow a job down or break it without a message.

Meanings and defaults: Ascend/pytorch's pages of environment variables, torch's
ProcessGroupNCCL.hpp, NCCL's guide.
"""

import re
from collections.abc import Mapping

from megatron_sorted.doctor.finding import Finding, ok, warn

SHOWN = re.compile(
    r"(TORCH_)?(NCCL|HCCL|GLOO)_|(CUDA|ASCEND)_|P2P_HCCL|PYTORCH_\w*ALLOC|TASK_QUEUE|CPU_AFFINITY|"
    r"INF_NAN|RANK_TABLE|TORCH_DEVICE_B"
)
"""Variables whose values are shown, and compared between processes."""
DEBUGGING = "unset it: every kernel is waited for. It is for debugging."
# fmt: off
RULES = {
    "CUDA_DEVICE_MAX_CONNECTIONS": (r"(?!1$).*", "export CUDA_DEVICE_MAX_CONNECTIONS=1: with "
        "tensor or sequence parallelism Megatron relies on it (before Blackwell)."),
    "CUDA_LAUNCH_BLOCKING": ("1", DEBUGGING),
    "ASCEND_LAUNCH_BLOCKING": ("1", DEBUGGING),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "unset it: a rank whose peer died would hang."),
    "NCCL_DEBUG": ("(?i)info|trace|abort", "export NCCL_DEBUG=WARN once it works: every rank "
        "writes pages at this level."),
    "NCCL_P2P_DISABLE": ("1", "unset it: GPUs of a node communicate through host memory."),
    "NCCL_SHM_DISABLE": ("1", "unset it: processes of a node communicate through the network."),
    "INF_NAN_MODE_ENABLE": ("0", "unset it: overflow saturates, and checks for inf and NaN see "
        "nothing (only the first 910 needs it)."),
    "RANK_TABLE_FILE": (".+", "unset it: torchrun needs none, and HCCL takes its hosts and "
        "devices instead of the job's."),
}
# fmt: on
"""Variable -> (the pattern of a harmful value, the remedy)."""


def check_variables(environment: Mapping[str, str], has_npu: bool) -> list[Finding]:
    """Check the variables of devices and communication; the last finding shows the other ones.

    Args:
        environment: The process's environment.
        has_npu: Whether this host has NPUs.
    """
    findings = [
        warn(name, environment[name] or "(empty)", remedy)
        for name, (pattern, remedy) in RULES.items()
        if name in environment and re.fullmatch(pattern, environment[name])
    ]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if has_npu and visible is not None and "ASCEND_RT_VISIBLE_DEVICES" not in environment:
        value = f"unset, but CUDA_VISIBLE_DEVICES={visible}"
        remedy = f"export ASCEND_RT_VISIBLE_DEVICES={visible}: NPUs do not know the other name."
        findings.append(warn("ASCEND_RT_VISIBLE_DEVICES", value, remedy))
    wrong = {finding.name for finding in findings}
    others = [
        f"{name}={value}"
        for name, value in sorted(environment.items())
        if SHOWN.match(name) and name not in wrong
    ]
    return [*findings, ok("variables", " ".join(others) or "none set")]
