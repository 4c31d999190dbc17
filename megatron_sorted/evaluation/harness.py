"""Tasks of lm-evaluation-harness for a sub-model, through the harness's own API. The only file that knows it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from megatron_sorted.errors import DataError, PlatformError
from megatron_sorted.evaluation.task_names import check_task_names, unknown_task
from megatron_sorted.exported.tokenizer import for_transformers
from megatron_sorted.text.tokenizer.contract import Tokenizer

USUAL_NEW_TOKENS = 256  # of a task that does not say; HFLM.max_gen_toks


class Harness:
    """lm-evaluation-harness with the tasks that were asked for.

    Attributes:
        tasks: Their names; groups are as good as tasks.
        version: Of the package.
    """

    def __init__(self, tasks: Sequence[str], tasks_path: Path | None = None):
        """Find the tasks.

        Raises:
            PlatformError: lm-eval is not installed.
            DataError: A task is unknown, or the folder does not exist.
        """
        check_task_names(tasks, tasks_path)
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise PlatformError(
                f"--tasks needs lm-evaluation-harness ({error}). pip install lm-eval, or leave --tasks out."
            ) from error
        self.tasks, self.version = tuple(tasks), getattr(lm_eval, "__version__", "unknown")
        include = None if tasks_path is None else str(tasks_path)
        # reading the index of its thousands of own tasks takes seconds
        self._manager = TaskManager(include_path=include, include_defaults=include is None)
        if include is not None and not set(tasks) <= set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=include)
        for task in tasks:
            if task not in self._manager.all_tasks:
                raise unknown_task(task, tasks_path)

    def check(self, positions: Mapping[str, int]) -> None:
        """Open the tasks' data and check that what they generate fits the models, before anything is measured.

        Args:
            positions: {name of a model: longest text it takes}.

        Raises:
            DataError: A task's data cannot be read, or it asks for more new tokens than a model has positions.
        """
        from lm_eval.tasks import get_task_dict

        try:
            opened = get_task_dict(list(self.tasks), self._manager)
        except Exception as error:  # whatever the files of a task lead to
            raise _stopped(error) from error
        for task in _leaves(opened):
            if task.config.output_type != "generate_until":
                continue
            asked = (task.config.generation_kwargs or {}).get("max_gen_toks", USUAL_NEW_TOKENS)
            for name, length in positions.items():
                if isinstance(asked, int) and asked >= length:
                    raise DataError(
                        f"--tasks: {task.config.task} asks for up to {asked} new tokens, and {name} has {length} positions for "
                        f"prompt and answer. Set max_gen_toks in the task's generation_kwargs below {length}."
                    )

    def run(
        self,
        sub_model: nn.Module,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> dict[str, dict]:
        """Return {task: {"samples": number, metric: {"value", "standard_error"}}} for one model.

        Raises:
            DataError: The task's data cannot be read, as when it would have to be fetched.
        """
        import logging

        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(
            logging.ERROR
        )  # it warns that a model object was given, which is the point
        model = HFLM(
            pretrained=sub_model,
            tokenizer=for_transformers(tokenizer),
            batch_size=batch_size,
            backend="causal",
        )
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(self.tasks),
                task_manager=self._manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,
                verbosity="ERROR",
            )
        except Exception as error:  # whatever the code of a task leads to
            raise _stopped(error) from error
        return {
            task: {
                "samples": found.get("n-samples", {}).get(task, {}).get("effective"),
                **_metrics(numbers),
            }
            for task, numbers in {**found["results"], **found.get("groups", {})}.items()
        }


def _stopped(error: Exception) -> DataError:
    """Return an error of the harness as one of ours, in a sentence."""
    reason = (str(error).strip() or "no reason given").split("\n")[0]
    return DataError(
        f"--tasks: lm-evaluation-harness stopped: {type(error).__name__}: {reason.rstrip('.')}. Mend the task's files; data "
        "must lie on this machine (or set HF_HUB_OFFLINE=0)."
    )


def _leaves(tasks: dict) -> Iterator[Any]:
    """Yield the tasks of groups of tasks."""
    for task in tasks.values():
        if isinstance(task, dict):
            yield from _leaves(task)
        elif task is not None:
            yield task


def _metrics(numbers: dict) -> dict[str, dict]:
    """Return {metric: {"value", "standard_error"}} of the harness's flat "metric,filter" and "metric_stderr,filter"."""
    found = {}
    for key, value in numbers.items():
        name, comma, kept = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{name}_stderr,{kept}")
        found[name if kept == "none" else f"{name} ({kept})"] = {
            "value": float(value),
            "standard_error": float(error) if isinstance(error, int | float) else None,
        }
    return found
