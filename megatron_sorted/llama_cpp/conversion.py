"""A nested model as files for llama.cpp, from the checks to the command that serves them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.open_model import OpenModel, open_model
from megatron_sorted.conversion.staging import check_destination, staged_directory
from megatron_sorted.conversion.tokenizers.prompt_form_files import form_of
from megatron_sorted.conversion.verifying.comparison import TOLERANCE
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.files import write_text_atomically
from megatron_sorted.llama_cpp.checking import Check, check_files
from megatron_sorted.llama_cpp.draft_settings import DraftSettings, draft_settings, serve_command
from megatron_sorted.llama_cpp.limits import chosen_depths, cut_networks
from megatron_sorted.llama_cpp.programs import CONVERTER, QUANTISER, LlamaCpp, shown_command
from megatron_sorted.llama_cpp.source_directory import end_ids
from megatron_sorted.llama_cpp.writing import (
    BASE,
    CONVERTED,
    GgufWriter,
    Log,
    WrittenFile,
    bytes_needed,
    check_programs,
    file_name,
)
from megatron_sorted.settings.derived import exit_depths

COMMAND_FILE = "llama-server.txt"
"""File beside the models with the command that serves them."""


@dataclass(frozen=True)
class GgufOptions:
    """Options of a conversion.

    Attributes:
        types: Types of weights; the first is the one that is served.
        depths: Depths to write; None for every exit.
        overwrite: Whether to replace the destination.
        verify: Whether to compare next tokens, where llama-server was found.
        tolerance: Largest error of a logit, relative to the largest one.
        threads: Threads of llama-server; None for all cores.
    """

    types: Sequence[str]
    depths: Sequence[int] | None = None
    overwrite: bool = False
    verify: bool = True
    tolerance: float = TOLERANCE
    threads: int | None = None


@dataclass(frozen=True)
class GgufResult:
    """What was written.

    Attributes:
        files: The files, under their final names.
        settings: Settings of the draft.
        command: The command that serves the deepest file.
        check: The comparison of next tokens; None without one.
    """

    files: list[WrittenFile]
    settings: DraftSettings
    command: str
    check: Check | None = None


class GgufConversion:
    """The conversion of one model.

    Args:
        given: The directory that the user named.
        model: The model in it.
        destination: Directory to write.
        options: Options.

    Raises:
        SettingsError, CheckpointError, DataError: llama.cpp cannot have this model, or the
            destination exists.
    """

    def __init__(
        self, given: Path, model: OpenModel, destination: Path, options: GgufOptions
    ) -> None:
        self.model, self.destination, self.options = model, destination, options
        self.name = given.resolve().name
        self.types = list(dict.fromkeys(options.types))
        depths = chosen_depths(model, options.depths)
        self.networks = cut_networks(model, depths)
        self.settings = draft_settings(given, exit_depths(model.settings))
        self.num_bytes = bytes_needed(self.networks, model.settings.vocab_size, self.types)
        check_destination(destination, options.overwrite, self.num_bytes, model.directory)

    def run(self, programs: LlamaCpp, log: Log) -> GgufResult:
        """Write the files; all of them appear under their names, verified, or none does.

        Args:
            programs: llama.cpp's programs.
            log: Called with a line before each slow step.

        Raises:
            PlatformError: A program is missing or failed.
            CheckpointError: A file is not the model, or cannot be written.
        """
        check_programs(programs, self.types)
        options, server = self.options, programs.server if self.options.verify else None
        model, layers, files, check = self.model, self.model.settings.num_layers, [], None
        with staged_directory(
            self.destination, options.overwrite, self.num_bytes, model.directory
        ) as staged:
            writer = GgufWriter(programs, staged, self.name, log)
            writer.try_vocabulary(next(iter(self.networks.values())))
            for depth, network in self.networks.items():
                files += writer.write(network, depth, layers, self.types, server is not None)
            if server is not None:
                check = self._check(server, files, writer.work / "nested", log)
            for file in files:
                if file.kind not in self.types:
                    file.path.unlink()
            writer.finish()
            kept = [file.moved_to(self.destination) for file in files if file.kind in self.types]
            command = self._serve_command(kept)
            write_text_atomically(staged / COMMAND_FILE, command + "\n")
        return GgufResult(kept, self.settings, command, check)

    def manual_commands(self, given: Path) -> list[str]:
        """Return the commands that do the same by hand, where llama.cpp is."""
        lines, files = [], {}
        for depth in self.networks:
            source = self.destination / f"hf-{depth}"
            extract = ["megatron-sorted", "extract", given, source, "--depth", depth]
            lines.append(shown_command(extract))
            paths = {kind: self._path(depth, kind) for kind in (*self.types, BASE)}
            direct = [kind for kind in self.types if kind in CONVERTED]
            others = [kind for kind in self.types if kind not in CONVERTED]
            for kind in dict.fromkeys([*direct, *([BASE] if others else [])]):
                converter = ["python", f"LLAMA_CPP/{CONVERTER}", source]
                lines.append(
                    shown_command([*converter, "--outfile", paths[kind], "--outtype", kind])
                )
            for kind in others:
                quantiser = f"LLAMA_CPP/build/bin/{QUANTISER}"
                lines.append(shown_command([quantiser, paths[BASE], paths[kind], kind.upper()]))
            files[depth] = paths[self.types[0]]
        return [*lines, self._serving(files)]

    def _path(self, depth: int, kind: str) -> Path:
        layers = self.model.settings.num_layers
        return self.destination / file_name(self.name, depth, layers, kind)

    def _check(self, server: Path, files: Sequence[WrittenFile], folder: Path, log: Log) -> Check:
        nested = self.model
        if nested.kind != "hugging_face":
            export_model(nested, folder, WriteOptions(verify=False))
            nested = open_model(folder)
        first = sorted(files, key=lambda file: file.kind != BASE)
        threads = self.options.threads or os.cpu_count() or 1
        return check_files(
            server, first, nested, form_of(nested), self.options.tolerance, threads, log
        )

    def _serve_command(self, files: Sequence[WrittenFile]) -> str:
        return self._serving(
            {file.depth: file.path for file in files if file.kind == self.types[0]}
        )

    def _serving(self, paths: Mapping[int, Path]) -> str:
        """Return the command that serves the deepest of the files, with the one that drafts."""
        last = max(paths)
        draft = paths.get(self.settings.depth) if self.settings.depth != last else None
        return serve_command(paths[last], draft, self.settings, end_ids(self.networks[last]))
