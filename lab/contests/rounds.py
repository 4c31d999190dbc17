"""Interleaved rounds, and the file that keeps every row, so that a stopped contest continues."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab.contests.contenders import LLAMA, OURS, Contender, Llama, Turn
from megatron_sorted.errors import DataError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reporting.markdown import commit

Row = dict[str, Any]
SAME_KIND = {"F32": "float32", "BF16": "bfloat16", "Q8_0": "int8", "Q4_K_M": "int8"}
"""llama.cpp's kind of weights -> ours that it is compared with."""


@dataclass(frozen=True)
class Match:
    """Contenders that continue the same prompts.

    Attributes:
        part: Letter of the part of the contest.
        threads: Number of threads.
        model: Name of the model.
        groups: Prompts by the name of their group.
        num_tokens: Number of new tokens of each text.
        at_once: Whether all prompts of a group are one batch.
    """

    part: str
    threads: int
    model: str
    groups: Mapping[str, Sequence[list[int]]]
    num_tokens: int
    at_once: bool = False

    @property
    def key(self) -> str:
        """Return the name that rows of this match share."""
        return f"{self.part}/{self.threads}/{self.model}"


@dataclass
class Store:
    """The rows of a contest in a file.

    Attributes:
        path: The file.
        settings: Everything that must be equal for rows to be compared.
        rows: The rows.
        facts: Whatever else is kept, such as tuned options.
    """

    path: Path
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what an earlier run has left.

        Raises:
            DataError: It had other settings, or the file is damaged.
        """
        if not self.path.is_file():
            return
        remedy = "Remove it, or choose another --output."
        whole = read_json_object(self.path, remedy)
        for name, value in json.loads(json.dumps(self.settings)).items():
            if whole.get("settings", {}).get(name) != value:
                raise DataError(
                    f"{self.path}: its {name} is {whole.get('settings', {}).get(name)}, not "
                    f"{value}: its rows cannot be continued. {remedy}"
                )
        self.facts = whole["facts"]
        self.rows = [
            {**table["common"], **dict(zip(table["columns"], row, strict=True))}
            for table in whole["tables"]
            for row in table["rows"]
        ]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep the rows of a round."""
        self.rows += rows
        known = self.facts.setdefault("commits", [])
        if (now := commit()) not in known:
            known.append(now)
        self.write()

    def write(self) -> None:
        """Write the file: a table for each contender of a match, a line for each row of it."""
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row["match"], row["name"], *row), []).append(row)
        tables = []
        for rows in groups.values():
            first = rows[0]
            common = {
                key: value for key, value in first.items() if all(row[key] == value for row in rows)
            }
            columns = [key for key in first if key not in common]
            lines = [
                json.dumps([row[key] for key in columns], separators=(",", ":")) for row in rows
            ]
            joined = ",\n".join(lines)
            tables.append(
                f'{{"common": {json.dumps(common)},\n"columns": {json.dumps(columns)},\n'
                f'"rows": [\n{joined}]}}'
            )
        head = json.dumps({"settings": self.settings, "facts": self.facts}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        joined = ",\n".join(tables)
        write_text_atomically(self.path, f'{head[:-2]},\n "tables": [\n{joined}\n]}}\n')

    def rounds_of(self, match: Match) -> int:
        """Return the number of rounds of a match that are kept."""
        numbers = [row["round"] for row in self.rows if row["match"] == match.key]
        return max(numbers, default=-1) + 1


def speed_of(part: str, turn: Turn, num_prompt_tokens: int) -> float:
    """Return the tokens a second that are compared.

    Our own programs' seconds are those of our clock and count everything. llama.cpp's are its own
    where it has them, so that HTTP costs it nothing: in part a for the new tokens alone, in b for
    the prompt, in d for both; in c our clock's, since its texts overlap.

    Args:
        part: Letter of the part.
        turn: What was done.
        num_prompt_tokens: Number of tokens of all prompts.
    """
    count = sum(map(len, turn.tokens))
    if part == "b":
        seconds = sum(one.prompt_seconds for one in turn.own) if turn.own else turn.seconds
        return num_prompt_tokens / seconds
    if turn.own is None or part == "c":
        return count / turn.seconds
    seconds = sum(one.seconds for one in turn.own)
    if part == "a":
        return sum(one.num_steps for one in turn.own) / seconds
    return count / (seconds + sum(one.prompt_seconds for one in turn.own))


def play(
    match: Match,
    contenders: Sequence[Contender],
    rounds: range,
    memory_speed: Callable[[int], float],
    tick: Callable[[], None] = lambda: None,
) -> Iterator[list[Row]]:
    """Yield the rows of each round; all take turns, and every round another one begins.

    Args:
        match: The match.
        contenders: The contenders.
        rounds: Numbers of the rounds.
        memory_speed: Function from a number of threads to the memory's bytes a second.
        tick: Called after each turn.
    """
    servers = [one.server for one in contenders if isinstance(one, Llama)]
    warm = next(iter(match.groups.values()))
    for contender in contenders:
        contender.write(warm[: len(warm) if match.at_once else 1], 4, match.at_once)
    for number in rounds:
        rows, texts, load = [], {}, rounded(os.getloadavg()[0])
        for place in range(len(contenders)):
            contender = contenders[(number + place) % len(contenders)]
            entry = contender.entry
            idle = [one for one in servers if one is not getattr(contender, "server", None)]
            for group, prompts in match.groups.items():
                before, used = sum(one.cpu_seconds() for one in idle), time.process_time()
                turn = contender.write(prompts, match.num_tokens, match.at_once)
                others = sum(one.cpu_seconds() for one in idle) - before
                if entry.engine == LLAMA:
                    others += time.process_time() - used
                texts[entry.name, group] = turn.tokens
                num_prompt_tokens = sum(map(len, prompts))
                rows.append(
                    {
                        "match": match.key, "part": match.part, "threads": match.threads,
                        "model": match.model, "group": group, "round": number, **asdict(entry),
                        "speed": rounded(speed_of(match.part, turn, num_prompt_tokens)),
                        "seconds": rounded(turn.seconds), "others_seconds": rounded(others),
                        "prompt_tokens": num_prompt_tokens,
                        "tokens": sum(map(len, turn.tokens)),
                        "drafted": turn.num_drafted, "accepted": turn.num_accepted,
                        "texts": len(prompts),
                        "sha256": digest(turn.tokens),
                    }
                )  # fmt: skip
                if turn.own is not None:
                    rows[-1] |= {
                        "own_prompt_seconds": rounded(sum(one.prompt_seconds for one in turn.own)),
                        "own_seconds": rounded(sum(one.seconds for one in turn.own)),
                    }
            tick()
        references = {
            contender.entry.kind: contender.entry.name
            for contender in contenders
            if contender.entry.engine == OURS and contender.entry.strategy == "full"
        }
        for row in rows:
            reference = references.get(SAME_KIND.get(row["kind"], row["kind"]))
            if reference is not None:
                row["same"] = num_same(
                    texts[row["name"], row["group"]], texts[reference, row["group"]]
                )
        speed = rounded(memory_speed(match.threads))
        rows.append(
            {
                "match": match.key, "part": match.part, "threads": match.threads,
                "model": match.model, "round": number, "name": "memory", "speed": speed,
                "load": load,
            }
        )  # fmt: skip
        yield rows


def num_same(texts: Sequence[list[int]], others: Sequence[list[int]]) -> int:
    """Return the number of texts that are equal.

    >>> num_same([[1, 2], [3]], [[1, 2], [4]])
    1
    """
    return sum(one == other for one, other in zip(texts, others, strict=True))


def digest(texts: Sequence[list[int]]) -> str:
    """Return the first digits of a hash of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def rounded(value: float) -> float:
    """Return a number with six digits.

    >>> rounded(1234.56789)
    1234.57
    """
    return float(f"{value:.6g}")
