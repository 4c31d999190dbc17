"""All that can be found out on one host without another one."""

import importlib.machinery
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.doctor import disks, interfaces, limits, packages, run_file
from megatron_sorted.doctor.devices import variables
from megatron_sorted.doctor.devices.local import Check, LocalDevices, read_devices
from megatron_sorted.doctor.devices.names import OPTIONAL
from megatron_sorted.doctor.finding import Finding, broken, doubtful
from megatron_sorted.doctor.probes import Probe, probe_all, training_path
from megatron_sorted.platform import versions
from megatron_sorted.platform.processes import World

IMPORT_SECONDS, DISK_SECONDS = 180.0, 30.0
OLDEST_TORCH = (2, 6)


@dataclass(frozen=True)
class DoctorOptions:
    """What the doctor is asked about.

    Attributes:
        environment: The process's environment.
        world: The job this process is part of.
        device: ``--device``.
        run: YAML file of a run, if any.
        folder: Where to try the disk; None: --save of the run, else here.
        world_size: ``--world-size``, if given.
    """

    environment: Mapping[str, str]
    world: World
    device: str
    run: Path | None = None
    folder: Path | None = None
    world_size: int | None = None


def _guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return a check's findings; a check that fails itself is a finding, so that the others still speak."""
    try:
        return check()
    except Exception as error:
        return [
            doubtful(
                name,
                f"could not be looked at: {type(error).__name__}: {error}",
                "Please report this.",
            )
        ]


def optional_libraries(path: list[str]) -> list[str]:
    """Return those libraries that megatron-core or torch import where they are installed, and that are."""
    return [
        name
        for name in OPTIONAL
        if importlib.machinery.PathFinder.find_spec(name, path) is not None
    ]


def look_around(question: DoctorOptions) -> list[Finding]:
    """Return everything found on this host, in the order of the table."""
    environment, num_nodes, path = question.environment, question.world.num_nodes, training_path()
    probes = probe_all(optional_libraries(path), environment, IMPORT_SECONDS)
    installed = packages.installed_versions(path)
    devices = read_devices(probes, environment)
    adapters = (
        sorted(os.listdir("/sys/class/infiniband"))
        if os.path.isdir("/sys/class/infiniband")
        else []
    )
    has_device = devices.present or bool(adapters)
    version, container = sys.version_info[:3], limits.read_container(Path("/sys/fs/cgroup"))
    named = variables.interfaces_named(environment)
    host, master = socket.gethostname(), environment.get("MASTER_ADDR")
    checks: list[Check] = [
        ("python", lambda: packages.check_python(version, sys.executable, sys.prefix, environment)),
        ("PYTHONPATH", lambda: packages.check_python_path(environment, version)),
        ("packages", lambda: packages.check_required(installed)),
        ("torch", lambda: check_torch(probes)),
        ("megatron-core", lambda: check_megatron(probes, path)),
        (
            "megatron_sorted",
            lambda: packages.check_own_copies(
                packages.copies_of("megatron_sorted", "megatron_sorted", path)
            ),
        ),
        *devices.checks(device_of(question), installed, environment),
        (
            "ports",
            lambda: variables.check_ports(
                environment, bool(devices.npus.device_files), *interfaces.read_ports()
            ),
        ),
        (
            "interfaces",
            lambda: interfaces.check_interfaces(interfaces.read_interfaces(), named, num_nodes),
        ),
        (
            "host name",
            lambda: interfaces.check_host_name(
                host, interfaces.addresses_of(host), num_nodes, named
            ),
        ),
        (
            "MASTER_ADDR",
            lambda: interfaces.check_master(
                master, interfaces.addresses_of(master or ""), num_nodes
            ),
        ),
        ("adapters", lambda: variables.check_adapters(environment, adapters, num_nodes)),
        ("limits", lambda: limits.check_limits(*limits.read_limits(), has_device)),
        ("/dev/shm", lambda: limits.check_shared_memory(*limits.read_shared_memory(), has_device)),
        ("memory", lambda: limits.check_memory(*limits.read_memory(), container)),
        (
            "CPU cores",
            lambda: limits.check_processors(container, environment, question.world.local_size),
        ),
        ("run folder", lambda: check_folder(question)),
    ]
    if question.run is not None:
        checks.append(("run file", lambda: check_run_file(question, devices)))
    return [finding for name, check in checks for finding in _guarded(name, check)]


def check_torch(probes: Mapping[str, Probe]) -> list[Finding]:
    """Check that torch can be imported, and say what else is to blame if it cannot."""
    probe = probes["torch"]
    if probe.facts is None:
        alone = probes.get("torch alone", Probe())
        if alone.facts is not None:
            return [
                broken(
                    "torch",
                    f"{alone.facts['version']}, but import torch fails: a backend that loads itself fails ({probe.error})",
                    "Mend or remove that backend (see its line), or export TORCH_DEVICE_BACKEND_AUTOLOAD=0.",
                )
            ]
        if "No module named 'torch'" in probe.error:
            return [
                broken(
                    "torch",
                    "not installed",
                    "pip install torch, of the build for this device (pytorch.org/get-started).",
                )
            ]
        return [broken("torch", probe.error, "Install torch anew, in an environment of its own.")]
    facts = probe.facts
    shown = f"{facts['version']} in {Path(facts['file']).parent}"
    if packages.numbers_of(facts["version"]) < OLDEST_TORCH:
        return [broken("torch", shown, f"pip install 'torch>={versions.shown(OLDEST_TORCH)}'.")]
    if not facts["distributed"] or not facts["gloo"]:
        return [
            broken(
                "torch",
                f"{shown}: built without {'gloo' if facts['distributed'] else 'torch.distributed'}",
                "Install torch from pytorch.org.",
            )
        ]
    return [Finding("torch", shown)]


def check_megatron(probes: Mapping[str, Probe], path: list[str]) -> list[Finding]:
    """Check that one megatron-core can be imported, of a version that training runs on."""
    copies = packages.copies_of("megatron/core", "megatron-core", path)
    found = packages.check_megatron_copies(copies)
    if copies and probes["megatron"].facts is None and probes["torch"].facts is not None:
        found.append(
            broken(
                "import megatron.core",
                probes["megatron"].error,
                "Mend what it names; Apex and Transformer Engine have lines of their own.",
            )
        )
    return found


def device_of(question: DoctorOptions) -> str:
    """Return the device that is asked for: ``--device``, or where that is "auto" the run's."""
    if question.device == "auto" and question.run is not None:
        settings, _ = run_file.load_run(question.run)
        return settings.device if settings is not None else "auto"
    return question.device


def folder_of(question: DoctorOptions) -> Path:
    """Return the folder the run writes to: as asked, else --save of the run, else the current one."""
    if question.folder is None and question.run is not None:
        settings, _ = run_file.load_run(question.run)
        if settings is not None and settings.save:
            return Path(settings.save)
    return question.folder or Path()


def check_folder(question: DoctorOptions) -> list[Finding]:
    """Check the folder the run writes to."""
    folder = disks.existing_folder(folder_of(question))
    kind = disks.file_system_of(folder.resolve(), Path("/proc/self/mountinfo").read_text())
    return disks.check_disk(
        folder, kind, disks.try_disk(folder, DISK_SECONDS), question.world.num_nodes
    )


def check_run_file(question: DoctorOptions, devices: LocalDevices) -> list[Finding]:
    """Check that the run of a YAML file can be started here."""
    settings, found = run_file.load_run(question.run)
    if settings is None:
        return found
    environment, world, device = (
        question.environment,
        question.world,
        devices.chosen(device_of(question)),
    )
    num_devices = devices.count(device, environment)
    of_job = world.size if world.size > 1 else None
    size = run_file.wanted_processes(settings, question.world_size, of_job, num_devices)
    site = run_file.Site(
        device, num_devices, devices.has_bf16(device), size, world.local_size if of_job else None
    )
    found = run_file.check_run(settings, site)
    found += variables.check_waits(environment, device, 60 * settings.distributed_timeout_minutes)
    needed: Any = run_file.checkpoint_bytes(settings) if settings.save else None
    if needed is not None:
        folder = disks.existing_folder(Path(settings.save))
        found += disks.check_space(
            folder, shutil.disk_usage(folder).free, needed, settings.save_retain
        )
    return found
