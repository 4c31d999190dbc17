"""Adaptation while serving: each request teaches which lossless strategy is fastest for its task.

What is learned is kept in a file beside the model.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_sorted.decoding.network import draft_key
from megatron_sorted.decoding.requested_strategy import RequestedStrategy
from megatron_sorted.decoding.strategies import SPECULATIVE, STRATEGIES, Full, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.tuning.search import Bandit
from megatron_sorted.decoding.tuning.tuned_options import LEARNED_FILE
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.old_names import rename_keys
from megatron_sorted.reading.json_text import parse_json, read_json_object
from megatron_sorted.reading.shown import shown

FORMAT = 1
LOSSLESS = tuple(strategy.name for strategy in (Full, *SPECULATIVE))
DEFAULT_TASK = "default"
MAX_TASKS = 1000
"""Number of tasks that are remembered; further ones count as the default task.

The limit keeps a client from filling the memory.
"""
JOBS_PER_SAVE = 16


class Adaptation:
    """A chooser of each job's strategy that learns from measured speeds and keeps them in a file.

    One thread alone chooses, learns and saves; any thread may read ``learned``, which is replaced
    and never modified.

    Args:
        strategies: The strategies to choose among.
        path: File to continue from and to write.
        origin: The source of the numbers: machine, draft model.

    Attributes:
        learned: {task: [{"strategy", "way", "times", "tokens_per_second"} of each strategy]}.

    Raises:
        DataError: The file is damaged.
        SettingsError: The file cannot be written.
    """

    def __init__(self, strategies: Sequence[Strategy], path: Path, origin: dict):
        self.strategies, self.path, self.unsaved = list(strategies), path, 0
        origin = {
            "format": FORMAT,
            **origin,
            "strategies": [{"name": strategy.name, **asdict(strategy)} for strategy in strategies],
        }
        self.origin = parse_json(json.dumps(origin), "origin")  # with lists, to compare with a file
        try:
            self.bandit = Bandit(strategies, self._read())
            self.bandit.begin(DEFAULT_TASK)
            self._write()
        except OSError as error:
            raise SettingsError(
                f"--adapt: {path} cannot be written ({error.strerror}). "
                "Name another with --adapt-file."
            ) from error
        self.learned = {
            task: self._row(task)
            for task, rows in self.bandit.tasks.items()
            if any(times for times, _, _ in rows)
        }

    def choose(self, task: str) -> tuple[str, int]:
        """Return the task that a job counts for, and the index of the strategy to use."""
        if task not in self.bandit.tasks and len(self.bandit.tasks) >= MAX_TASKS:
            task = DEFAULT_TASK
        return task, self.bandit.choose(task)

    def learn(self, task: str, index: int, num_tokens: int, seconds: float) -> None:
        """Record the speed of a job."""
        self.bandit.learn(task, index, num_tokens, seconds)
        self.learned = {**self.learned, task: self._row(task)}
        self.unsaved += 1

    def fail(self, task: str, index: int) -> None:
        """Record a failed job, so that its strategy is not tried forever; its speed is unknown."""
        self.bandit.fail(task, index)

    def save(self, least: int = 1) -> None:
        """Write the file if at least this many jobs are unsaved; print a line if that fails."""
        if self.unsaved >= least:
            self.unsaved = 0
            try:
                self._write()
            except OSError as error:
                print(
                    f"{self.path}: not written ({error.strerror}); the server continues without.",
                    file=sys.stderr,
                    flush=True,
                )

    def _write(self) -> None:
        write_text_atomically(
            self.path, json.dumps({**self.origin, "tasks": self.bandit.state_dict()}) + "\n"
        )

    def _read(self) -> dict:
        """Return the file's tasks; rename a file of other strategies, another machine or draft."""
        if not self.path.exists():
            return {}
        remedy = "Remove it, or name another with --adapt-file."
        kept = read_json_object(self.path, remedy)
        try:
            kept = rename_keys(kept)
            tasks = _checked(kept)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{shown(self.path)}: not written by megatron-sorted serve --adapt "
                f"({shown(error)}). {remedy}"
            ) from error
        if {key: value for key, value in kept.items() if key != "tasks"} == self.origin:
            return tasks
        numbered = (
            self.path.with_name(f"{self.path.stem}_{number}{self.path.suffix}")
            for number in itertools.count(1)
        )
        backup = next(path for path in numbered if not path.exists())
        self.path.rename(backup)
        print(
            f"[{self.path} was learned with other strategies or on another machine: it is now "
            f"{backup.name}, and learning starts anew]",
            flush=True,
        )
        return {}

    def _row(self, task: str) -> list[dict]:
        return [
            {
                "strategy": strategy.name,
                "way": strategy.name,  # the key of 0.6.0, for its clients
                "times": int(times),
                "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
            }
            for strategy, (times, tokens, seconds) in zip(
                self.strategies, self.bandit.tasks[task], strict=True
            )
        ]


def _checked(kept: dict) -> dict[str, list[list[float]]]:
    """Return the tasks of a file.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: The file is damaged.
    """
    if kept["format"] != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    tasks, size = kept["tasks"], len(kept["strategies"])
    for task, rows in tasks.items():
        for times, tokens, seconds in rows:
            if not (
                times == tokens == seconds == 0
                or (1 <= times <= tokens < float("inf") and 0 < seconds < float("inf"))
            ):
                raise ValueError(f"task {task!r} has impossible numbers")
        if len(rows) != size:
            raise ValueError(f"task {task!r} has {len(rows)} strategies, not {size}")
    if len(tasks) > MAX_TASKS:
        raise ValueError(f"it has more than {MAX_TASKS} tasks")
    return tasks


def candidate_strategies(choice: RequestedStrategy, generator: TextGenerator) -> list[Strategy]:
    """Return the lossless strategies tuned for the model and its draft, or the default ones.

    Raises:
        SettingsError: There is nothing to choose, or a tuned strategy does not fit the model.
        DataError: The file of tuned strategies is damaged.
    """
    if generator.draft is None and len(generator.network.depths) == 1:
        raise SettingsError(
            "--adapt: the model has no exits before its last layer, so there is nothing to "
            "choose. Leave it out, or give --depths or --draft."
        )
    tuned = choice.tuned(generator.draft, generator.network).get("strategies") or LOSSLESS
    names = [name for name in LOSSLESS if name == Full.name or name in tuned]
    return [
        choice.named(name).strategy(generator.network, generator.draft_for(STRATEGIES[name]))
        for name in names
    ]


def open_adaptation(
    choice: RequestedStrategy, generator: TextGenerator, machine: dict, path: Path | None = None
) -> Adaptation:
    """Build the `Adaptation` of a server; ``path`` is by default a file beside the model.

    Raises the errors of `candidate_strategies` and `Adaptation`.
    """
    network = generator.network
    origin = {
        # speeds of another kind of weights say nothing; torch's files stay as they were
        "machine": {**machine, "native": network.kind} if network.is_native else machine,
        "draft": None if generator.draft is None else draft_key(choice.draft, generator.draft),
    }
    return Adaptation(
        candidate_strategies(choice, generator), path or choice.model / LEARNED_FILE, origin
    )
