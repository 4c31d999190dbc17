"""Tasks of lm-evaluation-harness for a sub-model; the only file that uses the harness's API."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from megatron_sorted.errors import DataError, PlatformError
from megatron_sorted.evaluation.task_names import check_task_names, unknown_task
from megatron_sorted.exported.tokenizer import for_transformers
from megatron_sorted.text.tokenizer.contract import Tokenizer

DEFAULT_NEW_TOKENS = 256
"""Number of new tokens of a task that does not set it: HFLM.max_gen_toks."""


class Harness:
    """The requested tasks of lm-evaluation-harness.

    Attributes:
        tasks: Names of tasks or groups of tasks.
        version: Version of the package.
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
                f"--tasks needs lm-evaluation-harness ({error}). pip install lm-eval, or leave "
                "--tasks out."
            ) from error
        self.tasks, self.version = tuple(tasks), getattr(lm_eval, "__version__", "unknown")
        include = None if tasks_path is None else str(tasks_path)
        # the index of the harness's thousands of own tasks takes seconds to read
        self._manager = TaskManager(include_path=include, include_defaults=include is None)
        if include is not None and not set(tasks) <= set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=include)
        for task in tasks:
            if task not in self._manager.all_tasks:
                raise unknown_task(task, tasks_path)

    def check(self, positions: Mapping[str, int]) -> None:
        """Open the tasks' data and check that their answers fit the models' contexts.

        Args:
            positions: {name of a model: length of its context}.

        Raises:
            DataError: A task's data cannot be read, or it needs more new tokens than a context has.
        """
        try:
            opened = self._manager.load(list(self.tasks))["tasks"].values()
        except Exception as error:  # a task's files can raise anything
            raise _stopped(error) from error
        for task in opened:
            if task.config.output_type != "generate_until":
                continue
            needed = (task.config.generation_kwargs or {}).get("max_gen_toks", DEFAULT_NEW_TOKENS)
            for name, length in positions.items():
                if isinstance(needed, int) and needed >= length:
                    raise DataError(
                        f"--tasks: {task.config.task} needs up to {needed} new tokens, and {name} "
                        f"has {length} positions for prompt and answer. Set max_gen_toks in the "
                        f"task's generation_kwargs below {length}."
                    )

    def run(
        self,
        sub_model: nn.Module,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> dict[str, dict]:
        """Run the tasks on one model.

        Returns:
            {task: {"samples": number, metric: {"value", "standard_error"}}}.

        Raises:
            DataError: A task's data cannot be read, for example without a network.
        """
        import logging

        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # without its warning about a model that is given as an object
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        model = HFLM(
            pretrained=sub_model,
            tokenizer=for_transformers(tokenizer),
            batch_size=batch_size,
            backend="causal",
        )
        try:
            results = simple_evaluate(
                model=model,
                tasks=list(self.tasks),
                task_manager=self._manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,
                verbosity="ERROR",
            )
        except Exception as error:  # a task's code can raise anything
            raise _stopped(error) from error
        samples = results.get("n-samples", {})
        return {
            task: {"samples": samples.get(task, {}).get("effective"), **_metrics(numbers)}
            for task, numbers in {**results["results"], **results.get("groups", {})}.items()
        }


def _stopped(error: Exception) -> DataError:
    """Return an error of the harness as a `DataError`."""
    reason = (str(error).strip() or "no reason given").split("\n")[0]
    return DataError(
        f"--tasks: lm-evaluation-harness stopped: {type(error).__name__}: {reason.rstrip('.')}. "
        "Correct the task's files; data must be on this machine (or set HF_HUB_OFFLINE=0)."
    )


def _metrics(numbers: dict) -> dict[str, dict]:
    """Convert the harness's numbers to {metric: {"value", "standard_error"}}.

    Its keys are "metric,filter" and "metric_stderr,filter".
    """
    metrics = {}
    for key, value in numbers.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{name}_stderr,{kind}")
        metrics[name if kind == "none" else f"{name} ({kind})"] = {
            "value": float(value),
            "standard_error": float(error) if isinstance(error, int | float) else None,
        }
    return metrics
