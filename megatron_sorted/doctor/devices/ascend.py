"""Ascend NPUs: CANN, torch_npu, and whether they fit.

Versions of CANN for each torch_npu: COMPATIBILITY.md of github.com/Ascend/pytorch, August 2026.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.doctor.finding import Finding, fail, ok, warn
from megatron_sorted.doctor.packages import version_numbers
from megatron_sorted.doctor.probes import Probe

CANN_OF = {
    "2.12": ("9.1",),
    "2.11": ("9.1",),
    "2.10": ("9.1",),
    "2.9": ("8.5", "9.0", "9.1"),
    "2.8": ("8.3", "8.5", "9.0"),
    "2.7": ("8.3", "8.5", "9.0", "9.1"),
    "2.6": ("8.2", "8.3", "8.5"),
    "2.5": ("8.1", "8.2"),
    "2.4": ("8.0", "8.1"),
}
"""Version of torch_npu -> versions of CANN it was released for, oldest first."""
SET_ENV = ("usr/local/Ascend/cann/set_env.sh", "usr/local/Ascend/ascend-toolkit/set_env.sh")
# The runtime's own number stands before the toolkit's; from descriptions, not seen on a machine.
VERSION_LINES = (
    r"^runtime_running_version=\[[^:\]]*:(\d[\w.]*)",
    r"^version_dir=(\d[\w.]*)",
    r"^[Vv]ersion=(\d[\w.]*)",
)
VERSION_FILES = (
    "version.cfg",
    "version.info",
    "ascend_toolkit_install.info",
    "runtime/version.info",
    "compiler/version.info",
    "share/info/runtime/version.info",
    f"{os.uname().machine}-linux/ascend_toolkit_install.info",
)
REMOVE = "pip uninstall torch_npu (or export TORCH_DEVICE_BACKEND_AUTOLOAD=0 where it must stay)"


@dataclass(frozen=True)
class NpuHost:
    """The NPUs of a host according to its operating system.

    Attributes:
        device_files: Number of /dev/davinci0, /dev/davinci1, ...
        driver: Version of the driver; empty if unknown.
        set_env: The script that puts CANN on the paths; empty if there is none.
        cann: Version of CANN; empty if unknown.
        sourced: Whether the script has been run in this shell.
    """

    device_files: int
    driver: str
    set_env: str
    cann: str
    sourced: bool


def _version_of(path: Path) -> str:
    text = path.read_text(errors="replace") if path.is_file() else ""
    matches = (re.search(pattern, text, re.MULTILINE) for pattern in VERSION_LINES)
    return next((match.group(1) for match in matches if match), "")


def read_npu_host(root: Path, environment: Mapping[str, str]) -> NpuHost:
    """Read device files and versions below ``root`` (of the system: /), and the environment."""
    files = [path for path in (root / "dev").glob("davinci*") if path.name[7:].isdigit()]
    script = next((str(root / name) for name in SET_ENV if (root / name).is_file()), "")
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME") or ""
    folders = [Path(home)] if home else []
    if script:
        folders += [Path(script).parent, Path(script).parent / "latest"]
    versions = (_version_of(folder / name) for folder in folders for name in VERSION_FILES)
    driver = _version_of(root / "usr/local/Ascend/driver/version.info")
    cann = next(filter(None, versions), "")
    return NpuHost(len(files), driver, script, cann, bool(home))


def check_npus(
    host: NpuHost, installed: Mapping[str, str], probe: Probe | None, device: str
) -> list[Finding]:
    """Check that torch_npu and CANN are installed, fit each other and torch, and see the devices.

    Args:
        host: The NPUs according to the system.
        installed: Versions of distributions, by name in lower case.
        probe: The result of importing torch_npu; None if it is not installed.
        device: ``--device``.
    """
    wanted = device == "npu" or (device == "auto" and host.device_files > 0)
    torch, version = installed.get("torch", ""), installed.get("torch_npu", "")
    if probe is None:
        needed = _shown(torch) or "VERSION OF TORCH"
        remedy = f"pip install torch_npu=={needed}, beside a CPU build of torch."
        return [fail("torch_npu", "not installed", remedy)] * wanted
    findings = []
    if _shown(torch) != _shown(version) and torch and version:
        pair = f"torch=={_shown(version)}, or torch_npu=={_shown(torch)}"
        value = f"{version} beside torch {torch}"
        remedy = f"They must be the same: pip install {pair}."
        findings.append(fail("torch_npu version", value, remedy))
    findings += _check_cann(host, version)
    if probe.facts is None:
        findings.append(_import_failure(host, probe, wanted))
    elif wanted or probe.facts["devices"]:
        error = probe.facts.get("device_error", "")
        findings.append(_check_devices(host, probe.facts["devices"], error))
    return findings


def _shown(version: str) -> str:
    return ".".join(map(str, version_numbers(version)[:3]))


def _check_cann(host: NpuHost, torch_npu: str) -> list[Finding]:
    fitting = CANN_OF.get(".".join(map(str, version_numbers(torch_npu)[:2])), ())
    installed = version_numbers(host.cann)[:2]
    shown = host.cann or "version unknown"
    if host.cann and fitting and installed < version_numbers(fitting[0]):
        value = f"{shown}, older than torch_npu {torch_npu} was made for"
        remedy = (
            f"Install CANN {' or '.join(fitting)}, or the torch_npu of this CANN "
            "(COMPATIBILITY.md of Ascend/pytorch)."
        )
        return [fail("CANN", value, remedy)]
    if host.cann and fitting and ".".join(map(str, installed)) not in fitting:
        value = f"{shown}; torch_npu {torch_npu} was made with {' or '.join(fitting)}"
        remedy = "Use a pair of COMPATIBILITY.md of Ascend/pytorch if operators fail."
        return [warn("CANN", value, remedy)]
    if host.set_env and not host.sourced:
        value = f"{shown}, not on the paths: ASCEND_HOME_PATH is unset"
        remedy = (
            f"source {host.set_env}, on every node, in the shell that starts torchrun "
            "(ssh alone does not)."
        )
        return [fail("CANN", value, remedy)]
    return [ok("CANN", shown)] if host.cann or host.sourced else []


def _import_failure(host: NpuHost, probe: Probe, wanted: bool) -> Finding:
    text = " ".join(probe.errors)
    library = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object", text)
    value = probe.error
    if library:
        value = f"{library.group(1)} is missing: a library of CANN or the driver"
    if "Two accelerators" in text:
        remedy = f"Keep one kind of device: {REMOVE}, or install the CPU build of torch."
    elif library is None:
        remedy = f"Correct it; if this host has no NPU: {REMOVE}."
    elif host.set_env and not host.sourced:
        remedy = f"source {host.set_env}"
    elif not wanted:
        value += ", and this host has no NPU"
        remedy = f"{REMOVE}: with it, import torch fails."
    elif host.sourced:
        remedy = (
            "CANN is incomplete or of another version: reinstall its toolkit and kernels, and the "
            "driver; LD_LIBRARY_PATH must keep what set_env.sh puts in it."
        )
    else:
        remedy = "Install CANN (toolkit and kernels) and the driver, then source its set_env.sh."
    return fail("torch_npu", value, remedy)


def _check_devices(host: NpuHost, devices: Sequence[str], error: str) -> Finding:
    if not devices:
        remedy = (
            "npu-smi info shows whether the driver does; check ASCEND_RT_VISIBLE_DEVICES, and that "
            "the user is in the group HwHiAiUser."
        )
        return fail("NPU", "torch_npu sees no device", remedy)
    if error:
        remedy = "npu-smi info shows its state; check CANN's kernels package."
        return fail("NPU", f"{devices[0]}: {error}", remedy)
    shown = f"{len(devices)} x {devices[0]}" + (f", driver {host.driver}" if host.driver else "")
    if not supports_bf16(devices):
        remedy = "Train with --fp16; checks for inf and NaN see less on this device."
        return warn("NPU", f"{shown}: no bfloat16, and overflow saturates", remedy)
    return ok("NPU", shown)


def supports_bf16(devices: Sequence[str]) -> bool:
    """Return whether all these NPUs compute in bfloat16.

    The first 910 does not; 910B and 910_93 (910C) do.
    """
    return not any(re.fullmatch(r"Ascend ?910(A|Pro.*|Premium.*)?", name) for name in devices)
