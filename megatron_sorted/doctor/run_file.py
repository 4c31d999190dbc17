"""Checks of a run's settings against the machine it is to run on."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sorted.doctor.finding import Finding, fail, ok

HALF_BYTES, SINGLE_BYTES = 2, 4


@dataclass(frozen=True)
class Site:
    """The properties of a machine that a run's settings depend on.

    Attributes:
        device: The kind of device on which the run would compute.
        num_devices: Number of such devices on this host; 0 for cpu.
        has_bf16: Whether they compute in bfloat16.
        world_size: Number of processes of the job.
        local_processes: Number of the job's processes on this host; None if unknown.
    """

    device: str
    num_devices: int
    has_bf16: bool
    world_size: int
    local_processes: int | None


@cache
def load_run(path: Path) -> tuple[Any, list[Finding]]:
    """Return the settings of a YAML file, or None with a finding that says why not."""
    try:
        from megatron_sorted.conversion.starting_settings import starting_settings
        from megatron_sorted.errors import SortedError
        from megatron_sorted.settings.load import load_settings
    except ImportError as error:
        package = error.name or "megatron_sorted"
        value = f"{path}: cannot be read without {package}"
        return None, [fail("run file", value, f"pip install {package}")]
    try:
        return load_settings(["--config", str(path)], starting_settings), []
    except SortedError as error:
        return None, [_finding_of("run file", error)]


def _finding_of(name: str, error: Exception) -> Finding:
    """Return one of the project's errors, whose last sentence is the remedy, as a finding."""
    value, _, remedy = str(error).rstrip().removesuffix(".").rpartition(". ")
    return fail(name, value or remedy, f"{remedy}." if value else "Correct the setting.")


def check_run(settings: Any, site: Site) -> list[Finding]:
    """Check that a run can start at a site: rules, devices, precision, data and tokenizer."""
    from megatron_sorted.errors import SortedError
    from megatron_sorted.settings.rules import check_settings

    try:
        check_settings(settings, site.world_size)
    except SortedError as error:
        return [_finding_of("settings", error)]
    network = f"{settings.num_layers} layers, hidden {settings.hidden_size}"
    return [
        ok("settings", f"{network}, on {site.world_size} processes"),
        *_check_devices(settings, site),
        *_check_files(settings),
    ]


def _check_devices(settings: Any, site: Site) -> list[Finding]:
    findings = []
    local = site.local_processes
    if site.device != "cpu":
        if not site.num_devices:
            value = f"--device {settings.device}, and this host has none"
            findings.append(fail("devices", value, "Use --device cpu, or another host."))
        elif local is not None and local > site.num_devices:
            value = f"{local} processes on this host, {site.num_devices} devices"
            remedy = f"Start at most {site.num_devices} per host (--nproc-per-node)."
            findings.append(fail("devices", value, remedy))
        else:
            devices = f"{site.num_devices} x {site.device} on this host"
            findings.append(ok("devices", f"{devices}, {site.world_size} processes in all"))
    if settings.bf16 and not site.has_bf16:
        value = f"--bf16, which {site.device} here does not support"
        findings.append(fail("precision", value, "Use --fp16 instead."))
    return findings


def _check_files(settings: Any) -> list[Finding]:
    from megatron_sorted.settings.derived import data_prefixes

    prefixes = {
        "--data-path": data_prefixes(settings),
        "--valid-data-path": settings.valid_data_path,
        "--test-data-path": settings.test_data_path,
    }
    paths = [
        (flag, Path(f"{prefix}{suffix}"))
        for flag, given in prefixes.items()
        for prefix in given
        for suffix in (".bin", ".idx")
    ]
    if settings.tokenizer_model is not None and not Path(settings.tokenizer_model).is_dir():
        paths.append(("--tokenizer-model", Path(settings.tokenizer_model)))
    findings = [finding for flag, path in paths for finding in _check_file(flag, path)]
    shown = f"{len(paths)} readable files" if paths else "no files needed"
    return findings or [ok("data and tokenizer", shown)]


def _check_file(flag: str, path: Path) -> list[Finding]:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        remedy = "Give a file that every node can read (megatron-sorted prepare writes data)."
        return [fail(flag, f"{path}: {error.strerror}", remedy)]
    return [fail(flag, f"{path} is empty", "Prepare it again.")] if empty else []


def checkpoint_bytes(settings: Any) -> int | None:
    """Return the approximate size of a run's checkpoint, weights and optimizer.

    None if the size of the vocabulary is unknown.
    """
    from megatron_sorted.settings.costs import sub_model_parameters

    if settings.vocab_size is None:
        return None
    parameters = sub_model_parameters(settings, settings.vocab_size)[settings.num_layers]
    half = settings.bf16 or settings.fp16
    weights = HALF_BYTES + SINGLE_BYTES if half else SINGLE_BYTES
    moments = (2 if settings.optimizer == "adam" else 1) * SINGLE_BYTES
    return parameters * (weights + moments)


def num_processes(
    settings: Any, requested: int | None, of_job: int | None, num_devices: int
) -> int:
    """Return the number of processes to check a run for.

    Args:
        settings: The run's settings.
        requested: ``--world-size``, which comes first.
        of_job: The number of processes of this job, which comes next; then the file's.
        num_devices: Devices of this host; used unless the run's parallel sizes do not divide it.
    """
    if stated := requested or of_job or settings.world_size:
        return stated
    fewest = (
        settings.tensor_model_parallel_size
        * settings.pipeline_model_parallel_size
        * settings.context_parallel_size
    )
    return num_devices if num_devices and num_devices % fewest == 0 else fewest
