"""Options of all decoding tools: model, way, sampling; saved choices stand beside the model."""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.sampling import Sampling
from megatron_sorted.decoding.ways import WAYS, Way, check_way
from megatron_sorted.decoding.writer import Writer, open_writer
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.shown import printable

from .choices import CHOICES, draft_key, read_choices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WAY_OPTIONS = ("way", "depth", "way_depths", "thresholds", "measure", "num_draft_tokens", "num_levels", "num_branches", "num_nodes",
               "num_candidates")
"""What `add_way_options` adds."""


def own_device() -> str:
    """Returns what torch calls this machine's accelerator; cpu where there is none."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def check_device(name: str) -> None:
    """Returns nothing if torch sees such a device.

    Raises:
        SettingsError: It does not.
    """
    if name.split(":")[0] not in ("cpu", own_device()):
        raise SettingsError(f"--device: torch sees no {name} here. Use --device {own_device()}.")


def check_positive(values: argparse.Namespace, *names: str) -> None:
    """Returns nothing if these options, as far as they are given, are at least 1.

    Raises:
        SettingsError: One is not.
    """
    for name in names:
        if (value := getattr(values, name)) is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')}: {value} is not 1 or more. Change it.")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model, where and in which numbers."""
    parser.add_argument("model", type=Path, help="Hugging Face directory (llama, mistral, qwen2, qwen3) or one of checkpoints")
    parser.add_argument("--draft", type=Path, metavar="MODEL", help="another model of the same vocabulary that drafts")
    parser.add_argument("--depths", nargs="+", type=int, help="exits to use (default: those that config.json names)")
    parser.add_argument("--tokenizer", type=Path, help="directory or sentencepiece file (default: the model's directory)")
    parser.add_argument("--prompt-template", metavar="FORM",
                        help="form of conversations: plain, alpaca, chat (the tokenizer's own template) or chat:NAME (default: the form "
                             "the model was trained in)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="kind of numbers (%(default)s)")
    parser.add_argument("--device", default=own_device(), help="cpu, or an accelerator as torch calls it (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def add_way_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how to generate; a way takes those options that it knows."""
    group = parser.add_argument_group("way", f"options of a way that are not given are those of {CHOICES} beside the model, where "
                                             "tools/tune_decoding.py has made one, else usual ones")
    group.add_argument("--way", choices=tuple(WAYS), help="how to generate (default: the tuned one, else full)")
    group.add_argument("--exit-layer", type=int, dest="depth", help="of fixed and self_speculative: depth of the exit")
    group.add_argument("--exit-layers", type=int, nargs="+", dest="way_depths", help="of the others: depths of the exits, increasing")
    group.add_argument("--thresholds", type=float, nargs="+", help="how sure each of these exits must be, 0..1")
    group.add_argument("--measure", choices=("probability", "margin", "entropy"), help="of how sure an exit is (probability)")
    group.add_argument("--num-draft-tokens", type=int, help="drafted before a verification")
    for name, what in (("levels", "levels of the tree"), ("branches", "nodes of a level that are followed"), ("nodes", "nodes verified"),
                       ("candidates", "followers looked at of each; 0 for as many as are followed")):
        group.add_argument(f"--num-{name}", type=int, help=f"of tree: {what}")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which token is taken."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, help="0 takes the most likely token (default: the model's, else 0)")
    group.add_argument("--top-k", type=int, help="only so many most likely tokens")
    group.add_argument("--top-p", type=float, help="only the fewest tokens whose probabilities sum to this")
    group.add_argument("--repetition-penalty", type=float, help="above 1: tokens of the text so far are less likely (default: 1)")
    group.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")


def add_generation_config(parser: argparse.ArgumentParser) -> None:
    """Add whether a model's own sampling settings are taken."""
    parser.add_argument("--generation-config", choices=("auto", "none"), default="auto",
                        help="auto: sampling that is not asked for is as the model's generation_config.json says; none: it is not; "
                             "its stop tokens are always taken (%(default)s)")


def usual_sampling(values: argparse.Namespace, writer: Writer, temperature: float) -> Sampling:
    """Return how tokens are chosen where nobody asks otherwise.

    Args:
        values: With ``generation_config``.
        writer: The model.
        temperature: Where the model's files say none.

    Raises:
        DataError: generation_config.json holds a number that means nothing.
    """
    found = writer.form.sampling_defaults() if values.generation_config == "auto" else {}
    try:
        return Sampling(**{"temperature": temperature, **found})
    except SettingsError as error:
        raise DataError(f"{writer.form.where}/generation_config.json: {error} --generation-config none does without it.") from error


def sampling_of(values: argparse.Namespace, usual: Sampling | None = None) -> Sampling:
    """Return how tokens are chosen: as the command line says, else as usual, else the most likely ones.

    Raises:
        SettingsError: A number that means nothing.
    """
    asked = {name: value for name in ("temperature", "top_k", "top_p", "repetition_penalty")
             if (value := getattr(values, name)) is not None}
    return replace(usual or Sampling(), **asked, seed=values.seed)


def writer_of(values: argparse.Namespace) -> Writer:
    """Returns the model; says what it can do.

    Raises:
        SortedError: It cannot be used.
    """
    check_positive(values, "threads")
    if values.threads:
        torch.set_num_threads(values.threads)
    check_device(values.device)
    writer = open_writer(values.model, values.draft, values.depths, values.tokenizer, DTYPES[values.dtype], values.device,
                         values.prompt_template)
    for line in writer.notes:
        print(f"note: {printable(line)}", file=sys.stderr)
    return writer


def way_of(values: argparse.Namespace, network: Network, draft: Network | None = None) -> Way:
    """Returns the way that was asked for, or the tuned one, or full; what was tuned counts only with the draft model it was tuned with.

    Raises:
        SettingsError: It does not fit the model, or an option is given that it does not know.
        DataError: What was tuned is damaged.
    """
    tuned = read_choices(values.model / CHOICES, None if draft is None else draft_key(values.draft, draft))
    name = values.way or tuned.get("best") or "full"
    kind = WAYS[name]
    given = {"depth": values.depth, "depths": values.way_depths and tuple(values.way_depths), "measure": values.measure,
             "thresholds": None if values.thresholds is None else tuple(values.thresholds), "num_draft_tokens": values.num_draft_tokens,
             "num_levels": values.num_levels, "num_branches": values.num_branches, "num_nodes": values.num_nodes,
             "num_candidates": values.num_candidates}
    known = {field.name for field in fields(kind)}
    for option, value in given.items():
        if value is not None and option not in known:
            raise SettingsError(f"--way {name} does not take {option.replace('_', ' ')}; it takes {', '.join(sorted(known)) or 'nothing'}. "
                                "Leave it out, or use another way.")
    choices = {name: tuple(value) if isinstance(value, list) else value for name, value in tuned.get("ways", {}).get(name, {}).items()}
    asked = {key: value for key, value in given.items() if value is not None}
    words = {**usual(name, (draft or network), draft is not None), **choices, **asked}
    if values.way_depths and values.thresholds is None and "thresholds" in known:
        words["thresholds"] = (0.5,) * (len(words["depths"]) - (name == "tree"))
    try:
        way = kind(**words)
        check_way(way, network, draft)
    except TypeError as error:  # a value of another kind, which the command line lets nobody give
        raise DataError(f"{values.model / CHOICES}: its options of {name} are not as tools/tune_decoding.py writes them ({error}). "
                        "Remove it and tune again.") from error
    return way


def named_way(values: argparse.Namespace, name: str, writer: Writer) -> Way:
    """Returns the way of that name with tuned or usual options, whatever the command line says of another; errors as for `way_of`."""
    bare = argparse.Namespace(**{**vars(values), **dict.fromkeys(WAY_OPTIONS), "way": name})
    return way_of(bare, writer.network, writer.draft_for(WAYS[name]))


def usual(name: str, network: Network, is_other: bool) -> dict:
    """Returns a way's usual options for a model: its shallowest exits, and half sure."""
    exits = network.depths if is_other else network.depths[:-1]
    if name == "full" or not exits:
        return {} if name == "full" else {"depth": 0} if name in ("fixed", "self_speculative") else {"depths": (), "thresholds": ()}
    if name in ("fixed", "self_speculative"):
        return {"depth": exits[0]}
    some = exits[: max(1, (len(exits) + 1) // 2)] if name != "early_exit" else exits
    return {"depths": some, "thresholds": (0.5,) * (len(some) - (name == "tree")) if name != "early_exit" else (0.9,) * len(some)}
