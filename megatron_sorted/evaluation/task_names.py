"""A check of task names before lm-evaluation-harness is loaded, which takes many seconds."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_sorted.errors import DataError, PlatformError


def check_task_names(tasks: Sequence[str], tasks_path: Path | None = None) -> None:
    """Check that a YAML file of the harness or of the folder mentions each task.

    Whether it is a task is known to the harness alone.

    Raises:
        PlatformError: lm-eval is not installed.
        DataError: A task is unknown, or the folder does not exist.
    """
    if (package := find_spec("lm_eval")) is None:
        raise PlatformError(
            "--tasks needs lm-evaluation-harness (there is no lm_eval). pip install lm-eval, or "
            "leave --tasks out."
        )
    if tasks_path is not None and not tasks_path.is_dir():
        raise DataError(
            f"--tasks-path: {tasks_path} is no directory. "
            "Give the folder with the tasks' YAML files."
        )
    left = list(dict.fromkeys(tasks))
    for folder in filter(None, (tasks_path, Path(package.submodule_search_locations[0]) / "tasks")):
        for path in folder.rglob("*.y*ml"):
            if not left:
                return
            text = path.read_bytes()
            left = [task for task in left if task.encode("utf-8", "surrogateescape") not in text]
    if left:
        raise unknown_task(left[0], tasks_path)


def unknown_task(task: str, tasks_path: Path | None) -> DataError:
    """Return the error for an unknown task."""
    places = f", neither in {tasks_path} nor of its own. " if tasks_path else ". "
    return DataError(
        f"--tasks: lm-evaluation-harness knows no {task!r}{places}"
        "Give its name, and --tasks-path DIRECTORY for tasks in local YAML files."
    )
