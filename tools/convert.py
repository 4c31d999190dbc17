"""Converts models between Hugging Face directories and Megatron checkpoints, on a CPU, one tensor in memory at a time.

    python tools/convert.py import Llama-3.2-1B runs/llama --exit-layer-nums 4 8 12    Hugging Face -> checkpoint, for any layout
    python tools/convert.py import old_checkpoints runs/llama                          Megatron-LM (torch_dist, mp_rank_*) -> checkpoint
    python tools/convert.py export runs/llama my-llama                                 checkpoint -> Hugging Face
    python tools/convert.py verify runs/llama my-llama                                 are they the same model?
    python tools/convert.py export-adapter runs/llama my-adapter --base-model NAME     its low-rank adapters alone, for peft

Both directions are verified unless told otherwise: every tensor bit for bit, and the logits of every exit, ours against those of
transformers. What does not match is not written. Llama 1, 2 and 3, Mistral, Qwen2, Qwen2.5 and Qwen3 are understood. Low-rank adapters
of a checkpoint are merged into its matrices.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from megatron_sorted.conversion.convert import SHARD_BYTES, Exits, export_model, import_model
from megatron_sorted.conversion.families import DTYPES
from megatron_sorted.conversion.nested_card import part_names
from megatron_sorted.conversion.open_model import OpenModel, open_model
from megatron_sorted.conversion.peft_adapter import export_adapter
from megatron_sorted.conversion.verify import TOLERANCE, Comparison, compare
from megatron_sorted.errors import SettingsError, SortedError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.settings.derived import exit_depths

OPEN_BARS: list[tqdm] = []
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def progress_bars(title: str, num_bytes: int) -> Callable[[int], None]:
    """Returns what a bar of ``num_bytes`` is moved on with."""
    bar = tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, leave=True)
    OPEN_BARS.append(bar)

    def move(done: int) -> None:
        bar.update(done)
        if bar.n >= bar.total:
            bar.close()

    return move


def close_bars() -> None:
    """Ends the lines of bars that an error left unfinished, so that it stands on a line of its own."""
    while OPEN_BARS:
        OPEN_BARS.pop().close()


def parse_size(word: str) -> int:
    """Returns the bytes of a size such as 5GB.

    Raises:
        SettingsError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", word.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise SettingsError(f"--max-shard-size: {word!r} is no size. Write it as 500MB or 5GB.")
    return max(1, int(float(match[1]) * UNITS[match[2] or ""]))


def describe(model: OpenModel) -> str:
    """Returns one line about a model."""
    settings, depths = model.settings, exit_depths(model.settings)
    kind = "Hugging Face model" if model.kind == "hugging_face" else "checkpoint"
    exits = f"exits {' '.join(map(str, depths))}" if len(depths) > 1 else "one exit, the last layer"
    if own := part_names(settings):
        exits += f", each with {', '.join(own)} of its own"
    return (f"{model.directory}: {kind}, {settings.num_layers} layers, hidden {settings.hidden_size}, vocabulary {settings.vocab_size}, "
            f"{model.num_bytes / 1e6:,.1f} MB in {len(model.source.tensors)} tensors, {exits}")


def write_report(path: Path, comparison: Comparison) -> None:
    """Writes every tensor and exit of a comparison as JSON."""
    rows = [{**asdict(row), "dtype": str(row.dtype)} for row in comparison.tensors]
    content = {"computed_by": comparison.computed_by, "tolerance": comparison.tolerance, "problems": comparison.problems,
               "exits": [asdict(row) for row in comparison.exits], "tensors": rows}
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="import | export | verify | export-adapter")

    def add(verb: str, help_text: str, first: str, second: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(verb, help=help_text, description=help_text)
        command.add_argument("first", type=Path, nargs="?", metavar=first)
        command.add_argument("second", type=Path, nargs="?", metavar=second)
        command.add_argument("--load-dir", type=Path, help=f"another way to write {first}")
        command.add_argument("--save-dir", type=Path, help=f"another way to write {second}")
        command.add_argument("--ckpt-step", type=int, help="step of the checkpoint to take (default: the newest complete one)")
        command.add_argument("--vocab-size", type=int, help="number of real tokens, for a Megatron-LM checkpoint that knows only the "
                                                            "padded one (default: as it says)")
        command.add_argument("--lora-rank-used", type=int, metavar="RANK", help="of a checkpoint with nested low-rank adapters (--dylora), "
                             "how many ranks of them to use; 0: the network without them (default: all)")
        if verb == "export-adapter":
            command.add_argument("--overwrite", action="store_true", help="replace the destination if it exists")
            return command
        command.add_argument("--tolerance", type=float, default=TOLERANCE,
                             help=f"largest difference of logits, relative to the largest logit (default {TOLERANCE:g})")
        command.add_argument("--report", type=Path, help="also write the comparison of every single tensor to this JSON file")
        if verb != "verify":
            command.add_argument("--overwrite", action="store_true", help="replace the destination if it exists")
            command.add_argument("--no-verify", action="store_true", help="do not compare what was written with what there was")
            for axis in ("tensor", "pipeline"):
                command.add_argument(f"--target-{axis}-parallel-size", type=int, help=argparse.SUPPRESS)
        return command

    command = add("import", "makes a checkpoint of a Hugging Face model or of a Megatron-LM checkpoint", "MODEL", "CHECKPOINTS")
    command.add_argument("--exit-layer-nums", type=int, nargs="+", metavar="DEPTH", help="exits of the checkpoint (default: the model's)")
    command.add_argument("--use-exit-norm", action="store_true", default=None, help="give every exit a norm of its own, a copy of the last")
    command.add_argument("--untie-exit-output-weights", action="store_true", default=None,
                         help="give every exit a head of its own, a copy of the last")
    command.add_argument("--use-exit-block", action="store_true", default=None,
                         help="give every exit a layer of its own before its norm, a copy of the last (Balcony)")
    command.add_argument("--use-exit-mlp", action="store_true", default=None,
                         help="give every exit a normed MLP of its own before its norm, a copy of the last layer's (EE-Tuning)")
    command = add("export", "makes a Hugging Face model of a checkpoint", "CHECKPOINTS", "MODEL")
    command.add_argument("--dtype", choices=DTYPES, help="kind of numbers to write (default: as stored)")
    command.add_argument("--max-shard-size", default=f"{SHARD_BYTES // 10**9}GB", help="size of one file at most (default 5GB)")
    add("verify", "compares two directories of any kind", "ONE", "OTHER")
    command = add("export-adapter", "writes the low-rank adapters of a checkpoint in the format of peft", "CHECKPOINTS", "ADAPTER")
    command.add_argument("--base-model", required=True, help="the Hugging Face model they were trained on, for peft's configuration")
    values = parser.parse_args(arguments)
    values.first, values.second = values.first or values.load_dir, values.second or values.save_dir
    if values.first is None or values.second is None:
        parser.error(f"{values.verb} needs two directories")
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line says, and says what became of it."""
    values = parse(arguments)
    began = time.monotonic()
    model = open_model(values.first, values.ckpt_step, values.vocab_size, values.lora_rank_used)
    print(describe(model), flush=True)
    if values.verb == "export-adapter":
        count, num_bytes = export_adapter(model, values.second, values.base_model, values.overwrite)
        print(f"wrote {values.second}: {count} tensors, {num_bytes / 1e6:,.1f} MB ({time.monotonic() - began:.1f} s)")
        return
    if values.verb == "verify":
        other = open_model(values.second)
        print(describe(other), flush=True)
        comparison = compare(model, other, tolerance=values.tolerance, progress=progress_bars("verifying", other.num_bytes))
    else:
        notes: list[str] = []
        if values.target_tensor_parallel_size or values.target_pipeline_parallel_size:
            print("note: a checkpoint loads in any layout; the --target sizes are not needed")
        common = {"overwrite": values.overwrite, "verify": not values.no_verify, "tolerance": values.tolerance, "watch": progress_bars}
        if values.verb == "import":
            depths = None if values.exit_layer_nums is None else tuple(values.exit_layer_nums)
            exits = Exits(depths, values.use_exit_norm, values.untie_exit_output_weights, values.use_exit_block, values.use_exit_mlp)
            comparison = import_model(model, values.second, exits, **common)
        else:
            comparison = export_model(model, values.second, values.dtype, parse_size(values.max_shard_size), notes=notes, **common)
    if comparison is not None:
        print(f"\n{comparison.table()}\n")
        if values.report is not None:
            write_report(values.report, comparison)
    if values.verb == "verify":
        if comparison.problems:
            raise SortedError(f"{values.first} and {values.second} are not the same model. {'; '.join(comparison.problems[:5])}")
        print(f"the same model ({time.monotonic() - began:.1f} s)")
    else:
        state = "not verified" if comparison is None else "verified"
        print("\n".join(notes), end="\n" if notes else "")
        print(f"wrote {values.second}, {state} ({time.monotonic() - began:.1f} s)")


if __name__ == "__main__":
    run_main(main, clean_up=close_bars)
