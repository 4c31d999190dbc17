"""The settings of a run, against the machine it is to run on."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine

HALF_BYTES, SINGLE_BYTES = 2, 4


@dataclass(frozen=True)
class Site:
    """The machine, as far as a run's settings care.

    Attributes:
        device: Kind of device on which the run would compute.
        num_devices: Number of such devices on this host; 0 for cpu.
        has_bf16: Whether they compute in bfloat16.
        world_size: Processes of the job.
        local_processes: Number of the job's processes on this host; None if unknown.
    """

    device: str
    num_devices: int
    has_bf16: bool
    world_size: int
    local_processes: int | None


@cache
def load_run(path: Path) -> tuple[Any, list[Finding]]:
    """Return the settings of a YAML file, or None with the reason they could not be read."""
    try:
        from megatron_sorted.conversion.network import network_to_start_from
        from megatron_sorted.errors import SortedError
        from megatron_sorted.settings.load import load_settings
    except ImportError as error:
        return None, [
            broken(
                "run file",
                f"{path}: cannot be read without {error.name}",
                f"pip install {error.name or 'megatron_sorted'}",
            )
        ]
    try:
        return load_settings(["--config", str(path)], network_to_start_from), []
    except SortedError as error:
        return None, [_said("run file", error)]


def _said(name: str, error: Exception) -> Finding:
    """Return an error of ours, whose last sentence is the remedy, as a finding."""
    value, _, remedy = str(error).rstrip().removesuffix(".").rpartition(". ")
    return broken(name, value or remedy, f"{remedy}." if value else "Mend the setting.")


def check_run(settings: Any, site: Site) -> list[Finding]:
    """Return whether a run can be started at a site: its rules, processes, device, precision, data and tokenizer."""
    from megatron_sorted.errors import SortedError
    from megatron_sorted.settings.rules import check_settings

    try:
        check_settings(settings, site.world_size)
        found = [
            fine(
                "settings",
                f"{settings.num_layers} layers, hidden {settings.hidden_size}, on {site.world_size} processes",
            )
        ]
    except SortedError as error:
        return [_said("settings", error)]
    return (
        found + _check_devices(settings, site) + _check_files(settings) + check_timeouts(settings)
    )


def _check_devices(settings: Any, site: Site) -> list[Finding]:
    found = []
    if site.device != "cpu":
        asked = site.local_processes or site.world_size
        if not site.num_devices:
            found.append(
                broken(
                    "devices",
                    f"--device {settings.device}, and this host has none",
                    "Use --device cpu, or another host.",
                )
            )
        elif site.local_processes is not None and asked > site.num_devices:
            found.append(
                broken(
                    "devices",
                    f"{asked} processes on this host, {site.num_devices} devices",
                    f"Start at most {site.num_devices} per host (--nproc-per-node).",
                )
            )
        else:
            found.append(
                fine(
                    "devices",
                    f"{site.num_devices} x {site.device} on this host, {site.world_size} processes in all",
                )
            )
    if settings.bf16 and not site.has_bf16:
        found.append(
            broken(
                "precision",
                f"--bf16, which {site.device} here does not know",
                "Use --fp16 instead.",
            )
        )
    elif settings.fp16 and site.device == "cpu":
        found.append(
            doubtful(
                "precision", "--fp16 on cpu is slow and overflows easily", "Use --bf16 or neither."
            )
        )
    return found


def _check_files(settings: Any) -> list[Finding]:
    from megatron_sorted.files import same_path
    from megatron_sorted.settings.derived import data_prefixes

    found, seen = [], 0
    for flag, prefixes in (
        ("--data-path", data_prefixes(settings)),
        ("--valid-data-path", settings.valid_data_path),
        ("--test-data-path", settings.test_data_path),
    ):
        for prefix in prefixes:
            for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
                found += _check_file(flag, path)
                seen += 1
    if settings.tokenizer_model is not None:
        path = Path(settings.tokenizer_model)
        found += [] if path.is_dir() else _check_file("--tokenizer-model", path)
        seen += 1
    if (
        settings.load is not None
        and not Path(settings.load).is_dir()
        and not same_path(settings.load, settings.save)
    ):
        found.append(
            broken(
                "--load",
                f"{settings.load} is not a folder on this host",
                "Give one that holds a checkpoint.",
            )
        )
    return found or [
        fine("data and tokenizer", f"{seen} files there" if seen else "no files needed")
    ]


def _check_file(flag: str, path: Path) -> list[Finding]:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        return [
            broken(
                flag,
                f"{path}: {error.strerror}",
                "Give a file that every node can read (megatron-sorted prepare writes data).",
            )
        ]
    return [broken(flag, f"{path} is empty", "Prepare it again.")] if empty else []


def check_timeouts(settings: Any) -> list[Finding]:
    """Return whether the time after which a hang is noticed leaves time to notice it."""
    if (
        settings.hang_timeout_minutes is not None
        and settings.hang_timeout_minutes > 4 * settings.distributed_timeout_minutes
    ):
        return [
            doubtful(
                "--hang-timeout-minutes",
                settings.hang_timeout_minutes,
                f"--distributed-timeout-minutes {settings.distributed_timeout_minutes} ends a hung collective first, and names no "
                "rank. Make them alike.",
            )
        ]
    return []


def checkpoint_bytes(settings: Any) -> int | None:
    """Return about how large a checkpoint of a run is, weights and optimizer; None if the vocabulary is not known."""
    from megatron_sorted.settings.costs import sub_model_parameters

    if settings.vocab_size is None:
        return None
    parameters = sub_model_parameters(settings, settings.vocab_size)[settings.num_layers]
    half = settings.bf16 or settings.fp16
    weights = HALF_BYTES if half else SINGLE_BYTES
    optimizer = (SINGLE_BYTES if half else 0) + (
        2 * SINGLE_BYTES if settings.optimizer == "adam" else SINGLE_BYTES
    )
    return parameters * (weights + optimizer)


def wanted_processes(settings: Any, given: int | None, of_job: int | None, num_devices: int) -> int:
    """Return how many processes a run is checked for.

    As given, those of this job, those that its file says, this host's devices, else the fewest that can be.
    """
    if stated := given or of_job or settings.world_size:
        return stated
    fewest = (
        settings.tensor_model_parallel_size
        * settings.pipeline_model_parallel_size
        * settings.context_parallel_size
    )
    return num_devices if num_devices and num_devices % fewest == 0 else fewest
