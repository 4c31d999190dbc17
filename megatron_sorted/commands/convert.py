"""``megatron-sorted convert``: conversion on a CPU with one tensor in memory at a time.

A result that does not match its source is not kept.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.options.gguf import add_gguf_options
from megatron_sorted.commands.options.models import check_directories
from megatron_sorted.commands.parser import Parser
from megatron_sorted.conversion.hugging_face.families import DTYPES
from megatron_sorted.errors import SortedError

DESCRIPTION = """\
Convert models between Hugging Face directories and checkpoints, and verify them: every tensor bit
for bit, and the logits of every exit. VERB --help lists the options of each verb."""
VERBS = {
    "import": (
        "MODEL",
        "CHECKPOINTS",
        "Write a checkpoint from a Hugging Face model or a Megatron-LM checkpoint.",
        "Llama-3.2-1B runs/llama --exit-layer-nums 4 8 12",
    ),
    "export": (
        "CHECKPOINTS",
        "MODEL",
        "Write a Hugging Face model from a checkpoint.",
        "runs/llama my-llama --dtype bfloat16",
    ),
    "verify": (
        "ONE",
        "OTHER",
        "Compare two directories of any kind: are they the same model?",
        "runs/llama my-llama",
    ),
    "export-adapter": (
        "CHECKPOINTS",
        "ADAPTER",
        "Write the low-rank adapters of a checkpoint in the format of peft.",
        "runs/llama my-adapter --base-model NAME",
    ),
    "gguf": (
        "MODEL",
        "DESTINATION",
        "Write files for llama.cpp, one for each exit, by llama.cpp's own converter.",
        "my-llama my-llama-gguf --type q8_0 --llama-cpp llama.cpp",
    ),
}
"""Verb -> its two directories, its description, and the arguments of an example."""


def clean_up() -> None:
    """End the lines of progress bars that an error left unfinished."""
    if report := sys.modules.get("megatron_sorted.conversion.report"):
        report.end_bars()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the values of the options."""
    parser = Parser(
        "megatron-sorted convert",
        DESCRIPTION,
        f"megatron-sorted convert import {VERBS['import'][3]}",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    commands = {}
    for verb, (first, second, description, example) in VERBS.items():
        name = f"megatron-sorted convert {verb}"
        command = commands[verb] = verbs.add_parser(
            verb,
            prog=name,
            help=description,
            description=description,
            example=f"{name} {example}",
            usage=f"{name} {first} {second} [options]",
        )
        command.add_argument("first", type=Path, nargs="?", metavar=first, help="model to read")
        command.add_argument(
            "second",
            type=Path,
            nargs="?",
            metavar=second,
            help="model to compare with it" if verb == "verify" else "directory to write",
        )
        command.add_argument("--load-dir", type=Path, metavar="DIR", help=f"the same as {first}")
        command.add_argument("--save-dir", type=Path, metavar="DIR", help=f"the same as {second}")
        command.add_argument(
            "--ckpt-step",
            type=int,
            metavar="N",
            help="step of the checkpoint (default: the newest complete one)",
        )
        command.add_argument(
            "--vocab-size",
            type=int,
            metavar="N",
            help="vocabulary size without padding, if the checkpoint lacks it",
        )
        command.add_argument(
            "--lora-rank-used",
            type=int,
            metavar="RANK",
            help="rank to use of nested adapters (--dylora), 0: none (default: all)",
        )
        if verb != "export-adapter":
            command.add_argument(
                "--tolerance",
                type=float,
                metavar="X",
                help="largest difference of logits, relative (default: 1e-4)",
            )
        if verb not in ("export-adapter", "gguf"):
            command.add_argument(
                "--report",
                type=Path,
                metavar="FILE",
                help="also write the comparison of every tensor as JSON",
            )
        if verb != "verify":
            command.add_argument(
                "--overwrite", action="store_true", help="replace the destination if it exists"
            )
        if verb in ("import", "export", "gguf"):
            command.add_argument(
                "--no-verify", action="store_true", help="do not compare the result with the source"
            )
        if verb in ("import", "export"):
            for axis in ("tensor", "pipeline"):
                command.add_argument(
                    f"--target-{axis}-parallel-size", type=int, help=argparse.SUPPRESS
                )
    command = commands["import"]
    command.add_argument(
        "--exit-layer-nums",
        type=int,
        nargs="+",
        metavar="DEPTH",
        help="exits of the checkpoint (default: the model's)",
    )
    for flag, what in (
        ("--use-exit-norm", "norm of its own, a copy of the last"),
        ("--untie-exit-output-weights", "head of its own, a copy of the last"),
        ("--use-exit-block", "layer of its own, a copy of the last (Balcony)"),
        ("--use-exit-mlp", "normed MLP of its own, a copy of the last layer's"),
    ):
        command.add_argument(
            flag, action="store_true", default=None, help=f"every exit has a {what}"
        )
    commands["export"].add_argument(
        "--dtype", choices=DTYPES, metavar="KIND", help=f"{', '.join(DTYPES)} (default: as stored)"
    )
    for verb, choices, more in (
        ("export", ("last", "averaged", "both"), "or both, into MODEL/last and MODEL/averaged "),
        ("verify", ("last", "averaged"), ""),
    ):
        commands[verb].add_argument(
            "--weights",
            choices=choices,
            default="last",
            help="weights of a checkpoint of a run with --average-weights-from: of its last step, "
            f"averaged, {more}(default: %(default)s)",
        )
    commands["export"].add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of a file (default: %(default)s)",
    )
    commands["export-adapter"].add_argument(
        "--base-model",
        required=True,
        metavar="NAME",
        help="Hugging Face model that the adapters were trained on",
    )
    add_gguf_options(commands["gguf"])
    values = parser.parse_args(arguments)
    values.first, values.second = values.first or values.load_dir, values.second or values.save_dir
    if values.verb == "gguf" and values.first is not None and values.second is None:
        values.second = Path(f"{values.first.resolve().name}-gguf")
    if values.first is None or values.second is None:
        parser.error(f"{values.verb} needs two directories")
    if getattr(values, "weights", "last") == "both" and values.report is not None:
        parser.error(
            f"--report: {values.report} is one file, and --weights both writes two models. Export "
            "one after the other."
        )
    return values


def convert_to_gguf(values: argparse.Namespace) -> None:
    """Write files for llama.cpp, and print the command that serves them."""
    from megatron_sorted.conversion.open_model import open_model
    from megatron_sorted.conversion.report import describe
    from megatron_sorted.conversion.verifying.comparison import TOLERANCE
    from megatron_sorted.llama_cpp.conversion import GgufConversion, GgufOptions
    from megatron_sorted.llama_cpp.limits import notes_on
    from megatron_sorted.llama_cpp.programs import find_llama_cpp

    began = time.monotonic()
    programs = find_llama_cpp(values.llama_cpp)
    model = open_model(values.first, values.ckpt_step, values.vocab_size, values.lora_rank_used)
    print(describe(model), flush=True)
    tolerance = TOLERANCE if values.tolerance is None else values.tolerance
    options = GgufOptions(
        values.types, values.depth, values.overwrite, not values.no_verify, tolerance,
        values.threads,
    )  # fmt: skip
    conversion = GgufConversion(values.first, model, values.second, options)
    for line in notes_on(model.settings, conversion.types):
        print(f"note: {line}")
    if programs.converter is None:
        print("llama.cpp's converter was not found. Where it is (LLAMA_CPP: its folder), these do:")
        print("\n".join(conversion.manual_commands(values.first)))
    written = conversion.run(programs, lambda line: print(line, flush=True))
    state = "tensors verified"
    if written.check is not None:
        print(f"\n{written.check.table()}\n")
        for note in written.check.notes:
            print(f"note: {note}")
        state = "tensors and next tokens verified"
    elif not values.no_verify:
        state += "; next tokens were not compared, since llama-server was not found"
    for file in written.files:
        print(file.line())
    print(f"\ndrafts by {written.settings.origin}:\n{written.command}\n")
    print(f"wrote {values.second}, {state} ({time.monotonic() - began:.1f} s)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert or compare, and print the result."""
    values = parse(arguments)
    check_directories(values.first, values.second if values.verb == "verify" else None)
    if values.verb == "gguf":
        convert_to_gguf(values)
        return
    if getattr(values, "weights", "last") != "both":
        convert(values)
        return
    from megatron_sorted.conversion.open_model import open_model

    # before the first is written
    open_model(values.first, values.ckpt_step, values.vocab_size, weights="averaged")
    for weights in ("last", "averaged"):
        print(f"{weights} weights:", flush=True)
        one = {**vars(values), "weights": weights, "second": values.second / weights}
        convert(argparse.Namespace(**one))


def convert(values: argparse.Namespace) -> None:
    """Convert or compare one model, and print the result."""
    from megatron_sorted.conversion.exporting import export_model
    from megatron_sorted.conversion.hugging_face.peft_adapter import export_adapter
    from megatron_sorted.conversion.importing import import_model
    from megatron_sorted.conversion.open_model import open_model
    from megatron_sorted.conversion.origins import RequestedExits
    from megatron_sorted.conversion.report import describe, parse_size, progress_bars, write_report
    from megatron_sorted.conversion.verifying.comparison import TOLERANCE, compare
    from megatron_sorted.conversion.writing import ConversionResult, WriteOptions

    began = time.monotonic()
    model = open_model(
        values.first,
        values.ckpt_step,
        values.vocab_size,
        values.lora_rank_used,
        getattr(values, "weights", "last"),
    )
    print(describe(model), flush=True)
    if values.verb == "export-adapter":
        count, num_bytes = export_adapter(model, values.second, values.base_model, values.overwrite)
        print(
            f"wrote {values.second}: {count} tensors, {num_bytes / 1e6:,.1f} MB "
            f"({time.monotonic() - began:.1f} s)"
        )
        return
    tolerance = TOLERANCE if values.tolerance is None else values.tolerance
    if values.verb == "verify":
        other = open_model(values.second)
        print(describe(other), flush=True)
        written = ConversionResult(
            compare(model, other, tolerance, progress_bars("verifying", other.num_bytes))
        )
    else:
        if values.target_tensor_parallel_size or values.target_pipeline_parallel_size:
            print("note: a checkpoint loads in any layout; the --target sizes are not needed")
        writing = WriteOptions(values.overwrite, not values.no_verify, tolerance, progress_bars)
        if values.verb == "import":
            depths = None if values.exit_layer_nums is None else tuple(values.exit_layer_nums)
            exits = RequestedExits(
                depths,
                values.use_exit_norm,
                values.untie_exit_output_weights,
                values.use_exit_block,
                values.use_exit_mlp,
            )
            written = import_model(model, values.second, exits, writing)
        else:
            written = export_model(
                model, values.second, writing, values.dtype, parse_size(values.max_shard_size)
            )
    if (comparison := written.comparison) is not None:
        print(f"\n{comparison.table()}\n")
        if values.report is not None:
            write_report(values.report, comparison)
    if values.verb == "verify":
        if comparison.problems:
            raise SortedError(
                f"{values.first} and {values.second} are not the same model. "
                f"{'; '.join(comparison.problems[:5])}"
            )
        print(f"the same model ({time.monotonic() - began:.1f} s)")
    else:
        state = "not verified" if comparison is None else "verified"
        for note in written.notes:
            print(note)
        print(f"wrote {values.second}, {state} ({time.monotonic() - began:.1f} s)")
