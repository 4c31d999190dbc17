"""Models of the contest in llama.cpp's format, as ``megatron-sorted convert gguf`` writes them.

Prompts and texts of the contest are token ids, so the files have a stand-in vocabulary.
"""

import json
import os
import shutil
from pathlib import Path

from lab.build_llama_cpp import LlamaPrograms
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.llama_cpp.conversion import GgufConversion, GgufOptions
from megatron_sorted.llama_cpp.gguf_file import GgufFile
from megatron_sorted.llama_cpp.programs import CONVERTER, QUANTISER, LlamaCpp
from megatron_sorted.reading.json_text import read_json_object

KINDS = ("F32", "BF16", "Q8_0", "Q4_K_M")
"""llama.cpp's names of the kinds of weights."""
BYTE_TOKENS = 256
END = 0
"""Token that ends a text in the stand-in vocabulary: the one for unknown text, which no trained
model writes. llama.cpp never chooses it (ignore_eos), so that all texts have the same length."""


def stand_in_vocabulary(size: int) -> bytes:
    """Return a sentencepiece file of this many tokens, of which only the number matters.

    No token has a name such as </s>, which llama.cpp would take for the end of a text and, under
    ignore_eos, never write.

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
        if index < 2:
            piece.piece = ("<unk>", "<s>")[index]
            piece.type = piece_of.CONTROL if index else piece_of.UNKNOWN
        elif 3 <= index < num_bytes + 3:
            piece.piece, piece.type = f"<0x{index - 3:02X}>", piece_of.BYTE
        else:
            piece.piece, piece.score = f"t{index}", -float(index)
    return model.SerializeToString()


def write_file(model: Path, depth: int, kind: str, target: Path, build: LlamaPrograms) -> Path:
    """Return a GGUF file of a model's first layers, with the stand-in vocabulary; write it once.

    Args:
        model: Hugging Face directory.
        depth: Number of layers.
        kind: One of ``KINDS``.
        target: The file.
        build: The build of llama.cpp.

    Raises:
        PlatformError: A program of llama.cpp failed.
    """
    if target.is_file():
        return target
    work = target.with_suffix(".work")
    shutil.rmtree(work, ignore_errors=True)
    (work / target.stem).mkdir(parents=True)
    config = read_json_object(model / "config.json")
    config |= {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": END}
    source = work / target.stem
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (source / "tokenizer.model").write_bytes(stand_in_vocabulary(config["vocab_size"]))
    for file in model.glob("*.safetensors*"):
        os.symlink(file.absolute(), source / file.name)
    options = GgufOptions([kind.lower()], [depth], verify=False)
    conversion = GgufConversion(source, open_model(source), work / "files", options)
    programs = LlamaCpp(build.sources / CONVERTER, build.programs / QUANTISER)
    [written] = conversion.run(programs, lambda line: None).files
    written.path.rename(target)
    shutil.rmtree(work)
    return target


def bytes_a_token(file: Path) -> int:
    """Return the bytes of the weights that a token reads: all but an embedding that is no head.

    Raises:
        DataError: The file cannot be read.
    """
    tensors = GgufFile(file).tensors
    skipped = "token_embd.weight" if "output.weight" in tensors else None  # a tied one is the head
    return sum(tensor.num_bytes for name, tensor in tensors.items() if name != skipped)
