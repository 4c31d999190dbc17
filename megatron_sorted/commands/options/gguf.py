"""The verb ``convert gguf``: its options, and its work from the checks to the printed command."""

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it loads torch
    from megatron_sorted.conversion.open_model import OpenModel
    from megatron_sorted.conversion.origins import NetworkOrigin
    from megatron_sorted.llama_cpp.draft_settings import DraftSettings

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m")
COMMAND_FILE = "llama-server.txt"
"""File beside the models with the command that serves them."""


def add_gguf_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    command.add_argument(
        "--depth",
        type=int,
        nargs="+",
        metavar="N",
        help="exits to write, a file each (default: every exit)",
    )
    command.add_argument(
        "--type",
        dest="types",
        nargs="+",
        choices=TYPES,
        default=["bf16"],
        metavar="TYPE",
        help=f"types of weights: {', '.join(TYPES)} (default: bf16)",
    )
    command.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help="llama.cpp's sources, or the folder of its build (default: "
        "MEGATRON_SORTED_LLAMA_CPP, else the PATH)",
    )
    command.add_argument(
        "--threads", type=int, metavar="N", help="threads of the comparison (default: all cores)"
    )


def convert_to_gguf(values: argparse.Namespace) -> None:
    """Write GGUF files of a model's exits, verify them, and print the command that serves them.

    Raises:
        SortedError: The model cannot be converted, a program is missing or failed, or a file is
            not the model.
    """
    from megatron_sorted.conversion.open_model import open_model
    from megatron_sorted.conversion.report import describe
    from megatron_sorted.conversion.staging import check_destination, staged_directory
    from megatron_sorted.conversion.verifying.comparison import TOLERANCE
    from megatron_sorted.files import write_text_atomically
    from megatron_sorted.llama_cpp.draft_settings import draft_settings
    from megatron_sorted.llama_cpp.limits import chosen_depths, cut_networks, notes_on
    from megatron_sorted.llama_cpp.programs import find_llama_cpp
    from megatron_sorted.llama_cpp.writing import BASE, GgufWriter, bytes_needed, check_programs
    from megatron_sorted.settings.derived import exit_depths

    began = time.monotonic()
    found = find_llama_cpp(values.llama_cpp)
    model = open_model(values.first, values.ckpt_step, values.vocab_size, values.lora_rank_used)
    print(describe(model), flush=True)
    types = list(dict.fromkeys(values.types))
    depths = chosen_depths(model, values.depth)
    networks = cut_networks(model, depths)
    for line in notes_on(model.settings, types):
        print(f"note: {line}")
    settings = draft_settings(values.first, exit_depths(model.settings))
    num_bytes = bytes_needed(networks, model.settings.vocab_size, types)
    check_destination(values.second, values.overwrite, num_bytes, model.directory)
    try:
        check_programs(found, types)
    except Exception:
        print("\n".join(manual_commands(values, networks, types, settings)))
        raise
    verifies = not values.no_verify and found.server is not None
    with staged_directory(values.second, values.overwrite, num_bytes, model.directory) as staged:
        writer = GgufWriter(found, staged, name_of(values.first), lambda line: print(line))
        writer.try_vocabulary(networks[depths[0]])
        files = []
        for depth, network in networks.items():
            files += writer.write(network, depth, model.settings.num_layers, types, verifies)
        if verifies:
            nested = as_hugging_face(model, writer.work / "nested")
            tolerance = TOLERANCE if values.tolerance is None else values.tolerance
            print(_check(values, found.server, files, nested, tolerance))
            for file in files:
                if file.kind == BASE and BASE not in types:
                    file.path.unlink()
        writer.finish()
        kept = [file for file in files if file.path.exists()]
        command = _serving(values.second, kept, networks, settings, types[0])
        write_text_atomically(staged / COMMAND_FILE, command + "\n")
    for file in kept:
        print(
            f"wrote {values.second / file.path.name}: {file.num_bytes / 1e6:,.1f} MB, "
            f"{file.num_equal} of {file.num_tensors} tensors equal bit for bit; {file.stored}"
        )
    print(f"drafts: {settings.origin}\n{command}")
    print(
        f"wrote {values.second}, {'verified' if verifies else unverified(values, found.server)} "
        f"({time.monotonic() - began:.1f} s)"
    )


def unverified(values: argparse.Namespace, server: Path | None) -> str:
    """Return why next tokens were not compared."""
    if server is None:
        return "tensors verified; next tokens were not compared, since llama-server was not found"
    return "tensors verified; next tokens were not compared"


def name_of(model: Path) -> str:
    """Return the beginning of file names."""
    return model.resolve().name


def as_hugging_face(model: "OpenModel", directory: Path) -> "OpenModel":
    """Return a model as a Hugging Face directory, written if it is a checkpoint."""
    if model.kind == "hugging_face":
        return model
    from megatron_sorted.conversion.exporting import export_model
    from megatron_sorted.conversion.open_model import open_model
    from megatron_sorted.conversion.writing import WriteOptions

    export_model(model, directory, WriteOptions(verify=False))
    return open_model(directory)


def manual_commands(
    values: argparse.Namespace,
    networks: Mapping[int, "NetworkOrigin"],
    types: list[str],
    settings: "DraftSettings",
) -> list[str]:
    """Return the commands that do the same by hand, as lines."""
    from megatron_sorted.llama_cpp.draft_settings import serve_command
    from megatron_sorted.llama_cpp.programs import CONVERTER, QUANTISER, shown_command
    from megatron_sorted.llama_cpp.source_directory import end_ids
    from megatron_sorted.llama_cpp.writing import BASE, CONVERTED, file_name

    lines = ["these commands convert, where llama.cpp is (LLAMA_CPP: its folder):"]
    name, last = name_of(values.first), max(networks)
    paths = {}
    for depth in networks:
        source = values.second / f"hf-{depth}"
        lines.append(shown_command(
            ["megatron-sorted", "extract", values.first, source, "--depth", depth]))  # fmt: skip

        def path(kind: str, depth: int = depth) -> Path:
            return values.second / file_name(name, depth, last, kind)

        direct = [kind for kind in types if kind in CONVERTED]
        others = [kind for kind in types if kind not in CONVERTED]
        for kind in dict.fromkeys([*direct, *([BASE] if others else [])]):
            lines.append(shown_command(["python", f"LLAMA_CPP/{CONVERTER}", source, "--outfile",
                                        path(kind), "--outtype", kind]))  # fmt: skip
        lines += [
            shown_command(
                [f"LLAMA_CPP/build/bin/{QUANTISER}", path(BASE), path(kind), kind.upper()]
            )
            for kind in others
        ]
        paths[depth] = path(types[0])
    ends = end_ids(networks[last])
    lines.append(serve_command(paths[last], paths.get(settings.depth), settings, ends))
    return lines


def _check(
    values: argparse.Namespace, server: Path, files: list, nested: "OpenModel", tolerance: float
) -> str:
    """Compare next tokens; return the table, with notes."""
    from megatron_sorted.conversion.tokenizers.prompt_form_files import form_of
    from megatron_sorted.llama_cpp.checking import check_files

    threads = values.threads or os.cpu_count() or 1
    check = check_files(
        server, sorted(files, key=lambda file: file.kind != "f32"), nested, form_of(nested),
        tolerance, threads, lambda line: print(line, flush=True),
    )  # fmt: skip
    return "\n".join(["", check.table(), *(f"note: {line}" for line in check.notes), ""])


def _serving(
    folder: Path,
    files: list,
    networks: Mapping[int, "NetworkOrigin"],
    settings: "DraftSettings",
    kind: str,
) -> str:
    """Return the command that serves the deepest file, with the model that drafts."""
    from megatron_sorted.llama_cpp.draft_settings import serve_command
    from megatron_sorted.llama_cpp.source_directory import end_ids

    last = max(networks)
    paths = {file.depth: folder / file.path.name for file in files if file.kind == kind}
    draft = paths.get(settings.depth) if settings.depth != last else None
    return serve_command(paths[last], draft, settings, end_ids(networks[last]))
