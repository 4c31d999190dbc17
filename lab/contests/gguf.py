"""Models of the contest in llama.cpp's format, by its own converter and quantiser.

Prompts and texts of the contest are token ids, so the files have a stand-in vocabulary.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.build_llama_cpp import LlamaPrograms
from megatron_sorted.errors import PlatformError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reading.json_text import read_json_object

KINDS = ("F32", "BF16", "Q8_0", "Q4_K_M")
"""llama.cpp's names of the kinds of weights."""
BYTE_TOKENS = 256
END = 0
"""Token that ends a text in the stand-in vocabulary: the one for unknown text, which no trained
model writes. llama.cpp never chooses it (ignore_eos), so that all texts have the same length."""
COUNT = """\
import json, sys
from gguf import GGUFReader
sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(sys.argv[1]).tensors}
if "output.weight" in sizes:  # the embedding's rows are looked up; a tied one is the head
    del sizes["token_embd.weight"]
print(json.dumps(sum(sizes.values())))
"""


def stand_in_vocabulary(size: int) -> bytes:
    """Return a sentencepiece file of this many tokens, of which only the number matters.

    Args:
        size: Number of tokens, at least 3; with 260 or more there is one for every byte.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    piece_of = sentencepiece_model_pb2.ModelProto.SentencePiece
    num_bytes = BYTE_TOKENS if size > BYTE_TOKENS + 3 else 0
    model.trainer_spec.byte_fallback = bool(num_bytes)
    for index in range(size):
        piece = model.pieces.add()
        if index < 3:
            piece.piece = ("<unk>", "<s>", "</s>")[index]
            piece.type = piece_of.CONTROL if index else piece_of.UNKNOWN
        elif index < num_bytes + 3:
            piece.piece, piece.type = f"<0x{index - 3:02X}>", piece_of.BYTE
        else:
            piece.piece, piece.score = f"t{index}", -float(index)
    return model.SerializeToString()


def extract(model: Path, depth: int, target: Path) -> Path:
    """Return an ordinary Hugging Face directory of a model's first layers, in float32.

    Raises:
        PlatformError: The command failed.
    """
    if not (target / "config.json").is_file():
        _run(
            [sys.executable, "-m", "megatron_sorted", "extract", model, target, "--depth", depth,
             "--dtype", "float32", "--overwrite", "--no-verify"]
        )  # fmt: skip
    return target


def convert(directory: Path, target: Path, build: LlamaPrograms) -> Path:
    """Write an ordinary Hugging Face directory as a GGUF file in float32, unless it is there.

    Args:
        directory: The directory.
        target: The file.
        build: The build of llama.cpp, whose converter runs in this Python.

    Raises:
        PlatformError: The converter failed.
    """
    if target.is_file():
        return target
    source = target.with_suffix(".source")
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    config = read_json_object(directory / "config.json")
    config |= {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": END}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (source / "tokenizer.model").write_bytes(stand_in_vocabulary(config["vocab_size"]))
    for file in directory.glob("*.safetensors*"):
        os.symlink(file.absolute(), source / file.name)
    partial = target.with_suffix(".partial")
    converter = build.sources / "convert_hf_to_gguf.py"
    _run([sys.executable, converter, source, "--outfile", partial, "--outtype", "f32"])
    shutil.rmtree(source)
    partial.rename(target)
    return target


def quantise(source: Path, kind: str, build: LlamaPrograms) -> Path:
    """Return a float32 file in another kind of weights, written unless it is there.

    Raises:
        PlatformError: llama-quantize failed.
    """
    if kind == "F32":
        return source
    target = source.with_name(f"{source.stem}-{kind}.gguf")
    if not target.is_file():
        partial = target.with_suffix(".partial")
        _run([build.programs / "llama-quantize", source, partial, kind, "1"])
        partial.rename(target)
    return target


def bytes_a_token(file: Path, build: LlamaPrograms) -> int:
    """Return the bytes of the weights that a token reads: all but an embedding that is no head.

    Raises:
        PlatformError: The file cannot be read.
    """
    cached = file.with_suffix(".bytes.json")
    if not cached.is_file():
        package = str(build.sources / "gguf-py")
        printed = _run([sys.executable, "-c", COUNT, file], {"PYTHONPATH": package})
        write_text_atomically(cached, printed.strip().splitlines()[-1])
    return json.loads(cached.read_text(encoding="utf-8"))


def _run(command: Sequence[object], variables: dict[str, str] | None = None) -> str:
    """Run a program and return its standard output."""
    arguments = [str(word) for word in command]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env={**os.environ, **(variables or {})},
        check=False,
    )
    if done.returncode:
        raise PlatformError(
            f"{' '.join(arguments)}: it ended with status {done.returncode}. Correct what it says: "
            f"{(done.stdout + done.stderr).strip()[-800:]}"
        )
    return done.stdout
