"""The checks of one host, which need no other host."""

import importlib.machinery
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.doctor import addresses, disks, limits, native, packages, run_file
from megatron_sorted.doctor.devices.local import Check, LocalDevices, read_devices
from megatron_sorted.doctor.devices.names import PROBED
from megatron_sorted.doctor.finding import Finding, fail, ok, warn
from megatron_sorted.doctor.probes import Probe, probe_all, training_path
from megatron_sorted.platform import supported, versions
from megatron_sorted.platform.processes import World

IMPORT_SECONDS, DISK_SECONDS = 180.0, 30.0


@dataclass(frozen=True)
class DoctorOptions:
    """The host, job and run to check.

    Attributes:
        environment: The process's environment.
        world: The job this process is part of.
        device: ``--device``.
        run: YAML file of a run, if any.
        folder: The folder to measure; None: --save of the run, else the current one.
        world_size: ``--world-size``, if given.
        compile: Whether to compile the library that decodes on CPUs.
    """

    environment: Mapping[str, str]
    world: World
    device: str
    run: Path | None = None
    folder: Path | None = None
    world_size: int | None = None
    compile: bool = False


def _guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return a check's findings; a check that raises is a finding, so that the others still run."""
    try:
        return check()
    except Exception as error:
        value = f"could not be checked: {type(error).__name__}: {error}"
        return [warn(name, value, "Please report this.")]


def check_host(options: DoctorOptions) -> list[Finding]:
    """Check this host; return all findings in the order of the table."""
    environment, world, path = options.environment, options.world, training_path()
    installed = packages.installed_versions(path)
    libraries = [name for name in PROBED if importlib.machinery.PathFinder.find_spec(name, path)]
    probes = probe_all(libraries, environment, IMPORT_SECONDS)
    devices = read_devices(probes, environment)
    nodes = world.num_nodes
    host, master = socket.gethostname(), environment.get("MASTER_ADDR")
    # fmt: off
    checks: list[Check] = [
        ("python", lambda: packages.check_python(sys.version_info, sys.executable)),
        ("packages", lambda: packages.check_required(installed)),
        ("torch", lambda: check_torch(probes["torch"])),
        ("megatron-core", lambda: check_megatron(probes, path)),
        ("megatron_sorted", lambda: packages.check_own_copies(
            packages.copies_of("megatron_sorted", "megatron_sorted", path))),
        *devices.checks(device_of(options), installed, environment),
        ("host name", lambda: addresses.check_host_name(
            host, addresses.addresses_of(host), nodes, "GLOO_SOCKET_IFNAME" in environment)),
        ("MASTER_ADDR", lambda: addresses.check_master(
            master, environment.get("MASTER_PORT"), addresses.addresses_of(master or ""), nodes)),
        ("/dev/shm", lambda: limits.check_shared_memory(
            *limits.read_shared_memory(), devices.present)),
        ("CPU cores", lambda: limits.check_cores(
            len(os.sched_getaffinity(0)), os.cpu_count() or 1, world.local_size)),
        (native.NAME, lambda: native.check_native(
            environment, devices.present, options.compile)),
        ("run folder", lambda: check_folder(options)),
    ]
    # fmt: on
    if options.run is not None:
        checks.append(("run file", lambda: check_run_file(options, devices)))
    return [finding for name, check in checks for finding in _guarded(name, check)]


def check_torch(probe: Probe) -> list[Finding]:
    """Check that torch can be imported, is new enough and can communicate."""
    if probe.facts is None:
        if "No module named 'torch'" in probe.error:
            remedy = "pip install torch, of the build for this device (pytorch.org/get-started)."
            return [fail("torch", "not installed", remedy)]
        return [fail("torch", probe.error, "Reinstall torch, in an environment of its own.")]
    version = probe.facts["version"]
    shown = f"{version} in {Path(probe.facts['file']).parent}"
    if packages.version_numbers(version) < supported.TORCH:
        oldest = supported.shown(supported.TORCH)
        return [fail("torch", shown, f"pip install 'torch>={oldest}'.")]
    if not probe.facts["gloo"]:
        value = f"{shown}: built without torch.distributed's gloo"
        return [fail("torch", value, "Install torch from pytorch.org.")]
    return [ok("torch", shown)]


def check_megatron(probes: Mapping[str, Probe], path: list[str]) -> list[Finding]:
    """Check that one megatron-core, of a supported version, can be imported."""
    copies = packages.copies_of("megatron/core", "megatron-core", path)
    findings = packages.check_megatron_copies(copies)
    if copies and probes["megatron"].facts is None and probes["torch"].facts is not None:
        remedy = (
            "Reinstall what it names, or uninstall it: Apex and Transformer Engine are optional."
        )
        findings.append(fail("import megatron.core", probes["megatron"].error, remedy))
    missing = (probes["megatron"].facts or {}).get("missing")
    if missing:
        value = f"it lacks {', '.join(missing)}, which training uses"
        findings.append(fail("names in megatron-core", value, f"{versions.INSTALL}."))
    return findings


def device_of(options: DoctorOptions) -> str:
    """Return the requested device: ``--device``, or the run's where that is "auto"."""
    if options.device == "auto" and options.run is not None:
        settings, _ = run_file.load_run(options.run)
        return settings.device if settings is not None else "auto"
    return options.device


def folder_of(options: DoctorOptions) -> Path:
    """Return the folder to measure: ``--folder``, else --save of the run, else the current one."""
    if options.folder is None and options.run is not None:
        settings, _ = run_file.load_run(options.run)
        if settings is not None and settings.save:
            return Path(settings.save)
    return options.folder or Path()


def check_folder(options: DoctorOptions) -> list[Finding]:
    """Check the folder that the run writes to."""
    folder = disks.existing_folder(folder_of(options))
    mounts = Path("/proc/self/mountinfo").read_text()
    file_system = disks.file_system_of(folder.resolve(), mounts)
    return disks.check_disk(folder, file_system, disks.measure_disk(folder, DISK_SECONDS))


def check_run_file(options: DoctorOptions, devices: LocalDevices) -> list[Finding]:
    """Check that the run of a YAML file can start on this host."""
    settings, findings = run_file.load_run(options.run)
    if settings is None:
        return findings
    world, device = options.world, devices.chosen(device_of(options))
    num_devices = len(devices.names.get(device, []))
    of_job = world.size if world.size > 1 else None
    size = run_file.num_processes(settings, options.world_size, of_job, num_devices)
    local = world.local_size if of_job else None
    site = run_file.Site(device, num_devices, devices.has_bf16(device), size, local)
    findings = run_file.check_run(settings, site)
    checkpoint_bytes = run_file.checkpoint_bytes(settings) if settings.save else None
    if checkpoint_bytes is not None:
        folder = disks.existing_folder(Path(settings.save))
        free = shutil.disk_usage(folder).free
        findings += disks.check_space(folder, free, checkpoint_bytes, settings.save_retain)
    return findings
