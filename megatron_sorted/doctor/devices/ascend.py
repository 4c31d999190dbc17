"""Ascend NPUs: CANN, torch_npu, and whether they go together.

Which CANN a torch_npu was made with: COMPATIBILITY.md of github.com/Ascend/pytorch, August 2026.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine
from megatron_sorted.doctor.packages import numbers_of
from megatron_sorted.doctor.probes import Probe

# torch_npu of one torch version comes in releases for several CANN versions; a newer CANN than these is not refused
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
SET_ENV = ("usr/local/Ascend/cann/set_env.sh", "usr/local/Ascend/ascend-toolkit/set_env.sh")
# the runtime has a number of its own, which stands before the toolkit's; not seen on a machine, from descriptions
VERSION_LINES = (
    r"^runtime_running_version=\[[^:\]]*:(\d[\w.]*)",
    r"^version_dir=(\d[\w.]*)",
    r"^[Vv]ersion=(\d[\w.]*)",
)
REMOVE = "pip uninstall torch_npu (or export TORCH_DEVICE_BACKEND_AUTOLOAD=0 where it must stay)"


@dataclass(frozen=True)
class NpuHost:
    """What the operating system says of NPUs.

    Attributes:
        device_files: Number of /dev/davinci0, /dev/davinci1, ...
        unreadable: Those of them this user may not open.
        driver: Version of the driver; empty if unknown.
        set_env: The script that puts CANN on the paths; empty if it was not found.
        cann: Version of CANN; empty if unknown.
        sourced: Whether the script has been run in this shell.
    """

    device_files: int
    unreadable: tuple[str, ...]
    driver: str
    set_env: str
    cann: str
    sourced: bool


def _version_of(path: Path) -> str:
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = next(
        (found for pattern in VERSION_LINES if (found := re.search(pattern, text, re.MULTILINE))),
        None,
    )
    return found.group(1) if found else ""


def read_npu_host(root: Path, environment: Mapping[str, str]) -> NpuHost:
    """Return what the files below ``root`` (of the system: /) and the environment say of NPUs."""
    files = sorted(
        path for path in (root / "dev").glob("davinci*") if re.fullmatch(r"davinci\d+", path.name)
    )
    script = next((str(root / name) for name in SET_ENV if (root / name).is_file()), "")
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME") or ""
    places = ([Path(home)] if home else []) + (
        [Path(script).parent, Path(script).parent / "latest"] if script else []
    )
    names = (
        "version.cfg",
        "version.info",
        "ascend_toolkit_install.info",
        "runtime/version.info",
        "compiler/version.info",
        "share/info/runtime/version.info",
        f"{os.uname().machine}-linux/ascend_toolkit_install.info",
    )
    cann = next(
        (version for place in places for name in names if (version := _version_of(place / name))),
        "",
    )
    unreadable = tuple(path.name for path in files if not os.access(path, os.R_OK | os.W_OK))
    driver = _version_of(root / "usr/local/Ascend/driver/version.info")
    return NpuHost(len(files), unreadable, driver, script, cann, bool(home))


def check_npus(
    host: NpuHost, installed: Mapping[str, str], probe: Probe | None, device: str
) -> list[Finding]:
    """Return whether torch_npu and CANN are there, fit each other and torch, and see the devices.

    Args:
        host: What the system has.
        installed: Versions of distributions, by name in small letters.
        probe: What became of importing torch_npu; None if it is not installed.
        device: ``--device``.
    """
    wanted = device == "npu" or (device == "auto" and host.device_files > 0)
    version = installed.get("torch_npu", "")
    if probe is None:
        if wanted:
            torch = ".".join(map(str, numbers_of(installed.get("torch", ""))))
            return [
                broken(
                    "torch_npu",
                    "not installed",
                    f"pip install torch_npu=={torch or 'VERSION OF TORCH'}, beside a CPU build of torch.",
                )
            ]
        return []
    found = _check_versions(host, installed.get("torch", ""), version)
    if probe.facts is None:
        found.append(_import_failure(host, probe, wanted))
    elif wanted or probe.facts["devices"]:
        found += _check_devices(
            host, probe.facts.get("devices", []), probe.facts.get("device_error", "")
        )
    return found


def _check_versions(host: NpuHost, torch: str, version: str) -> list[Finding]:
    found = []
    if torch and version and numbers_of(torch)[:3] != numbers_of(version)[:3]:
        theirs, ours = (".".join(map(str, numbers_of(one)[:3])) for one in (version, torch))
        found.append(
            broken(
                "torch_npu version",
                f"{version} beside torch {torch}",
                f"They must be the same: pip install torch=={theirs}, or torch_npu=={ours}.",
            )
        )
    pairs = CANN_OF.get(".".join(map(str, numbers_of(version)[:2])))
    have = numbers_of(host.cann)[:2]
    if host.cann and pairs and have < min(numbers_of(pair) for pair in pairs):
        found.append(
            broken(
                "CANN",
                f"{host.cann}, older than torch_npu {version} was made for",
                f"Install CANN {' or '.join(pairs)}, or the torch_npu of this CANN (COMPATIBILITY.md of Ascend/pytorch).",
            )
        )
    elif host.cann and pairs and ".".join(map(str, have)) not in pairs:
        found.append(
            doubtful(
                "CANN",
                f"{host.cann}; torch_npu {version} was made with {' or '.join(pairs)}",
                "Take one of the pairs in COMPATIBILITY.md of Ascend/pytorch if operators fail.",
            )
        )
    elif host.set_env and not host.sourced:
        found.append(
            broken(
                "CANN",
                f"{host.cann or 'version unknown'}, not on the paths: ASCEND_HOME_PATH is unset",
                f"source {host.set_env}, on every node, in the shell that starts torchrun (ssh alone does not).",
            )
        )
    elif host.cann or host.sourced:
        found.append(fine("CANN", host.cann or "version unknown"))
    return found


def _import_failure(host: NpuHost, probe: Probe, wanted: bool) -> Finding:
    said = " ".join(probe.errors)
    library = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object", said)
    if "Two accelerators" in said:
        return broken(
            "torch_npu",
            probe.error,
            f"Keep one kind of device: {REMOVE}, or install the CPU build of torch.",
        )
    if library is None:
        return broken("torch_npu", probe.error, f"Mend it; if this host has no NPU: {REMOVE}.")
    value = f"{library.group(1)} is missing: a library of CANN or the driver"
    if host.set_env and not host.sourced:
        return broken("torch_npu", value, f"source {host.set_env}")
    if not wanted:
        return broken(
            "torch_npu",
            f"{value}, and this host has no NPU",
            f"{REMOVE}: with it, import torch fails.",
        )
    if host.sourced:
        return broken(
            "torch_npu",
            value,
            "CANN is incomplete or of another version: install its toolkit and kernels anew, and the driver; "
            "LD_LIBRARY_PATH must keep what set_env.sh puts in it.",
        )
    return broken(
        "torch_npu",
        value,
        "Install CANN (toolkit and kernels) and the driver, then source its set_env.sh.",
    )


def _check_devices(host: NpuHost, devices: Sequence[str], error: str) -> list[Finding]:
    if host.unreadable:
        return [
            broken(
                "NPU",
                f"/dev/{host.unreadable[0]} may not be opened by this user",
                "Add the user to the group HwHiAiUser.",
            )
        ]
    if not devices:
        return [
            broken(
                "NPU",
                "torch_npu sees no device",
                "npu-smi info says whether the driver does; look at ASCEND_RT_VISIBLE_DEVICES.",
            )
        ]
    if error:
        return [
            broken(
                "NPU",
                f"{devices[0]}: {error}",
                "npu-smi info shows whether it is in order; check CANN's kernels package.",
            )
        ]
    shown = f"{len(devices)} x {devices[0]}" + (f", driver {host.driver}" if host.driver else "")
    if not knows_bf16(devices):
        return [
            doubtful(
                "NPU",
                f"{shown}: no bfloat16, and overflow saturates",
                "Train with --fp16; checks for inf and NaN see less on this device.",
            )
        ]
    return [fine("NPU", shown)]


def knows_bf16(devices: Sequence[str]) -> bool:
    """Return whether all these NPUs compute in bfloat16: the first 910 does not, 910B and 910_93 (910C) do."""
    return not any(re.fullmatch(r"Ascend ?910(A|Pro.*|Premium.*)?", name) for name in devices)


def check_both_kinds(torch: Mapping | None, num_gpus: int, npu: Probe | None) -> list[Finding]:
    """Return whether GPU and NPU software are in each other's way."""
    if npu is not None and torch is not None and torch.get("cuda") is not None and num_gpus:
        return [
            broken(
                "two kinds of devices",
                "torch for CUDA with a GPU, and torch_npu",
                f"torch takes one kind only. On this host: {REMOVE}.",
            )
        ]
    return []
