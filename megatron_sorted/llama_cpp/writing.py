"""GGUF files of a nested model: written by llama.cpp's converter, verified, and then published."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.conversion.origins import NetworkOrigin
from megatron_sorted.errors import CheckpointError, PlatformError
from megatron_sorted.llama_cpp.gguf_file import GgufFile
from megatron_sorted.llama_cpp.limits import family_of
from megatron_sorted.llama_cpp.programs import CONVERTER, QUANTISER, LlamaCpp, run_program
from megatron_sorted.llama_cpp.source_directory import (
    converter_variables,
    end_ids,
    write_source,
    write_vocabulary,
)
from megatron_sorted.llama_cpp.tensors import compare_tensors
from megatron_sorted.settings.costs import sub_model_parameters

BASE = "f32"
"""Type from which others are quantised, and which is verified."""
BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9,
    "q4_0": 4.5, "q3_k_m": 3.9,
}  # fmt: skip
"""Types of weights -> about how many bits one takes, for the room on the disk."""
CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""Types that the converter itself writes; others need llama-quantize."""
REMEDY = (
    "llama.cpp's converter cannot take this model. Its tokenizer must be one that llama.cpp knows: "
    "a sentencepiece file, or a tokenizer.json of a model in its list."
)
Log = Callable[[str], None]


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written.

    Attributes:
        depth: Number of the nested model's layers in it.
        kind: Type of its weights.
        path: The file.
        num_bytes: Size of the file.
        num_equal: Number of tensors that are the model's, bit for bit.
        num_tensors: Number of all its tensors.
        stored: How its matrices are stored, such as "Q4_K: 60, Q6_K: 10".
    """

    depth: int
    kind: str
    path: Path
    num_bytes: int
    num_equal: int
    num_tensors: int
    stored: str

    def moved_to(self, folder: Path) -> "WrittenFile":
        """Return the same under its name in another folder."""
        return dataclasses.replace(self, path=folder / self.path.name)

    def line(self) -> str:
        """Return a line about it."""
        return (
            f"wrote {self.path}: {self.num_bytes / 1e6:,.1f} MB, {self.num_equal} of "
            f"{self.num_tensors} tensors equal bit for bit; {self.stored}"
        )


def file_name(name: str, depth: int, num_layers: int, kind: str) -> str:
    """Return the name of a file.

    >>> file_name("my-llama", 4, 12, "q8_0")
    'my-llama-04-q8_0.gguf'
    """
    return f"{name}-{depth:0{len(str(num_layers))}d}-{kind}.gguf"


def bytes_needed(
    networks: Mapping[int, NetworkOrigin], vocab_size: int, types: Sequence[str]
) -> int:
    """Return about how many bytes the files, and those in between, take on the disk."""
    kept, most = 0.0, 0.0
    for network in networks.values():
        settings = network.settings
        count = sub_model_parameters(settings, vocab_size)[settings.num_layers]
        kept += sum(count * BITS[kind] / 8 for kind in types)
        most = max(most, 8.0 * count)  # a copy in Hugging Face's format, and one in float32
    return int(kept + most)


def check_programs(programs: LlamaCpp, types: Sequence[str]) -> None:
    """Check that the programs for these types were found.

    Raises:
        PlatformError: One was not.
    """
    missing = [] if programs.converter else [CONVERTER]
    missing += [QUANTISER] if not programs.quantiser and set(types) - set(CONVERTED) else []
    if missing:
        raise PlatformError(
            f"{' and '.join(missing)}: not found on this machine, so nothing was converted. Name "
            "llama.cpp's folder with --llama-cpp, or run the commands above where it is."
        )


class GgufWriter:
    """The writer of all files of one model into one folder.

    Args:
        programs: llama.cpp's programs.
        folder: An existing folder for the files, and for what is removed again.
        name: The model's name, for file names.
        log: Called with a line before each slow step.
    """

    def __init__(self, programs: LlamaCpp, folder: Path, name: str, log: Log = lambda line: None):
        self.programs, self.folder, self.name, self.log = programs, folder, name, log
        self.work = folder / ".work"
        self.variables = converter_variables(self.work / "modules")

    def try_vocabulary(self, network: NetworkOrigin) -> None:
        """Let the converter read configuration and tokenizer, before any weight is copied.

        Raises:
            PlatformError: It cannot.
        """
        source = self.work / "vocabulary"
        write_vocabulary(network, source)
        self._convert(source, self.work / "vocabulary.gguf", "--vocab-only")
        shutil.rmtree(source)

    def write(
        self, network: NetworkOrigin, depth: int, num_layers: int, types: Sequence[str],
        keep_base: bool,
    ) -> list[WrittenFile]:  # fmt: skip
        """Write a sub-model in each of some types; every plain tensor is compared with the model's.

        Args:
            network: The sub-model.
            depth: Depth in the nested model.
            num_layers: Layers of the nested model.
            types: The types.
            keep_base: Whether a file in float32 is needed, whatever the types; it is the last one.

        Raises:
            CheckpointError: A file is not the model.
            PlatformError: A program failed.
        """
        source = self.work / f"source_{depth}"
        self.log(f"exit @{depth}: writing it for the converter")
        write_source(network, source)
        wanted = [*types, *([BASE] if keep_base and BASE not in types else [])]
        paths = {
            kind: self.folder / file_name(self.name, depth, num_layers, kind) for kind in wanted
        }
        base = paths.get(BASE, self.work / f"base_{depth}.gguf")
        quantised = [kind for kind in wanted if kind != BASE and self.programs.quantiser]
        if quantised or BASE in wanted:
            self._convert(source, base, "--outtype", BASE)
        for kind in wanted:
            self.log(f"exit @{depth}: {kind}")
            if kind in quantised:
                self._quantise(base, paths[kind], kind)
            elif kind != BASE:
                self._convert(source, paths[kind], "--outtype", kind)
        shutil.rmtree(source)
        if base not in paths.values():
            base.unlink(missing_ok=True)
        return [self._judge(network, depth, kind, paths[kind]) for kind in wanted]

    def finish(self) -> None:
        """Remove everything but the files."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _convert(self, source: Path, target: Path, *options: str) -> None:
        command = [sys.executable, self.programs.converter, source, "--outfile", target, *options]
        run_program(
            [*command, "--model-name", self.name],
            self.variables,
            REMEDY if "--vocab-only" in options else "",
        )

    def _quantise(self, base: Path, target: Path, kind: str) -> None:
        command = [self.programs.quantiser, base, target, kind.upper(), os.cpu_count() or 1]
        run_program(command)

    def _judge(self, network: NetworkOrigin, depth: int, kind: str, path: Path) -> WrittenFile:
        """Compare a file with its origin.

        Raises:
            CheckpointError: They differ.
        """
        file = GgufFile(path)
        num_equal, problems = compare_tensors(network, family_of(network.model), file)
        problems += metadata_problems(network, file)
        if problems:
            more = " ..." if len(problems) > 5 else ""
            raise CheckpointError(
                f"{path.name}: what llama.cpp's converter wrote is not the model, so nothing was "
                f"written. {'; '.join(problems[:5])}{more}"
            )
        stored = ", ".join(f"{name}: {count}" for name, count in sorted(file.kinds().items()))
        size = path.stat().st_size
        return WrittenFile(depth, kind, path, size, num_equal, len(file.tensors), stored)


def metadata_problems(network: NetworkOrigin, file: GgufFile) -> list[str]:
    """Return a sentence for each number or special token of a file that is not the model's."""
    tokenizer, ends = network.model.open_tokenizer(), end_ids(network)
    architecture = file.metadata.get("general.architecture", "")
    settings = network.settings
    expected = {
        f"{architecture}.block_count": settings.num_layers,
        f"{architecture}.embedding_length": settings.hidden_size,
        f"{architecture}.attention.head_count": settings.num_attention_heads,
        "tokenizer.ggml.eos_token_id": ends[0] if ends else None,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
    }
    if "tokenizer.ggml.add_bos_token" in file.metadata:
        expected["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    problems = [
        f"{name} is {file.metadata.get(name)}, not {value}"
        for name, value in expected.items()
        if value is not None and file.metadata.get(name) != value
    ]
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) != settings.vocab_size:
        problems.append(f"it has {len(tokens)} tokens, not {settings.vocab_size}")
    return problems
