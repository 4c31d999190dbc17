"""Adapting while serving: which lossless way is fastest is learned from every request, for each task apart, and kept beside the model."""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_sorted.decoding.choice import StrategyChoice
from megatron_sorted.decoding.network import draft_key
from megatron_sorted.decoding.strategies import SPECULATIVE, STRATEGIES, Full, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.tuning.choices import LEARNED
from megatron_sorted.decoding.tuning.search import Bandit
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.old_names import rename_keys
from megatron_sorted.reading.json_text import parse_json, read_json_object
from megatron_sorted.reading.shown import shown

FORMAT = 1
LOSSLESS = tuple(strategy.name for strategy in (Full, *SPECULATIVE))
DEFAULT_TASK = "default"
MOST_TASKS = 1000
"""Tasks that are remembered, so that a client cannot fill the memory; requests of further ones count as the default task."""
JOBS_A_SAVE = 16


class Adaptation:
    """Chooses the way of each job, learns how fast it was, and keeps that in a file.

    One thread alone chooses, learns and saves; any may read ``learned``, which is replaced and never changed.

    Args:
        ways: To choose among.
        path: File to go on from and to write.
        origin: Where the numbers come from: machine, draft model.

    Attributes:
        learned: {task: [{"way", "times", "tokens_per_second"} of each way]}.

    Raises:
        DataError: The file is damaged.
        SettingsError: It cannot be written.
    """

    def __init__(self, strategies: Sequence[Strategy], path: Path, origin: dict):
        self.strategies, self.path, self.unsaved = list(strategies), path, 0
        origin = {
            "format": FORMAT,
            **origin,
            "strategies": [{"name": strategy.name, **asdict(strategy)} for strategy in strategies],
        }
        self.origin = parse_json(json.dumps(origin), "origin")  # lists, as in the file
        try:
            self.bandit = Bandit(strategies, self._read())
            self.bandit.begin(DEFAULT_TASK)
            self._write()
        except OSError as error:
            raise SettingsError(
                f"--adapt: {path} cannot be written ({error.strerror}). Name another with --adapt-file."
            ) from error
        self.learned = {
            task: self._row(task)
            for task, rows in self.bandit.tasks.items()
            if any(times for times, _, _ in rows)
        }

    def choose(self, task: str) -> tuple[str, int]:
        """Return under which task a job counts, and the place of the way that it takes."""
        if task not in self.bandit.tasks and len(self.bandit.tasks) >= MOST_TASKS:
            task = DEFAULT_TASK
        return task, self.bandit.choose(task)

    def learn(self, task: str, place: int, num_tokens: int, seconds: float) -> None:
        """Note a job that wrote something."""
        self.bandit.learn(task, place, num_tokens, seconds)
        self.learned = {**self.learned, task: self._row(task)}
        self.unsaved += 1

    def fail(self, task: str, place: int) -> None:
        """Note a job that failed: nothing is learned of its speed, but the way is not tried for ever."""
        self.bandit.fail(task, place)

    def save(self, least: int = 1) -> None:
        """Write the file if that many jobs were learned from since the last time; where that fails, a line says so."""
        if self.unsaved >= least:
            self.unsaved = 0
            try:
                self._write()
            except OSError as error:
                print(
                    f"{self.path}: not written ({error.strerror}); the server goes on without.",
                    file=sys.stderr,
                    flush=True,
                )

    def _write(self) -> None:
        write_text_atomically(
            self.path, json.dumps({**self.origin, "tasks": self.bandit.state_dict()}) + "\n"
        )

    def _read(self) -> dict:
        """Return the file's tasks; a file of other ways, or of another machine or draft, gets another name."""
        if not self.path.exists():
            return {}
        remedy = "Remove it, or name another with --adapt-file."
        kept = read_json_object(self.path, remedy)
        try:
            kept = rename_keys(kept)
            tasks = _checked(kept)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{shown(self.path)}: not written by megatron-sorted serve --adapt ({shown(error)}). {remedy}"
            ) from error
        if {key: value for key, value in kept.items() if key != "tasks"} == self.origin:
            return tasks
        aside = next(
            path
            for number in itertools.count(1)
            if not (
                path := self.path.with_name(f"{self.path.stem}_{number}{self.path.suffix}")
            ).exists()
        )
        self.path.rename(aside)
        print(
            f"[{self.path} was learned with other ways, or elsewhere: it is {aside.name} now, and learning begins anew]",
            flush=True,
        )
        return {}

    def _row(self, task: str) -> list[dict]:
        return [
            {
                "strategy": strategy.name,
                "way": strategy.name,
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
        ValueError, TypeError, KeyError, AttributeError: It is damaged.
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
            raise ValueError(f"task {task!r} has {len(rows)} ways, not {size}")
    if len(tasks) > MOST_TASKS:
        raise ValueError(f"it has more than {MOST_TASKS} tasks")
    return tasks


def candidate_strategies(choice: StrategyChoice, writer: TextGenerator) -> list[Strategy]:
    """Return the lossless ways that were tuned for the model, and with its draft; where none were, usual ones.

    Raises:
        SettingsError: There is nothing to choose, or a tuned way does not fit the model.
        DataError: What was tuned is damaged.
    """
    if writer.draft is None and len(writer.network.depths) == 1:
        raise SettingsError(
            "--adapt: the model has no exits before its last layer, so there is nothing to choose. Leave it out, or give "
            "--depths or --draft."
        )
    tuned = choice.tuned(writer.draft).get("strategies") or LOSSLESS
    names = [name for name in LOSSLESS if name == Full.name or name in tuned]
    return [
        choice.named(name).strategy(writer.network, writer.draft_for(STRATEGIES[name]))
        for name in names
    ]


def open_adaptation(
    choice: StrategyChoice, writer: TextGenerator, machine: dict, path: Path | None = None
) -> Adaptation:
    """Return what chooses the ways of a server, and keeps in ``path`` what it learns on this machine.

    Errors as for `candidate_strategies` and `Adaptation`.
    """
    origin = {
        "machine": machine,
        "draft": None if writer.draft is None else draft_key(choice.draft, writer.draft),
    }
    return Adaptation(candidate_strategies(choice, writer), path or choice.model / LEARNED, origin)
