"""Sentencepiece files of many settings, trained on this repository, and a check of their copies."""

import functools
import io
import random
from pathlib import Path

import sentencepiece
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_sorted.conversion.tokenizers.check import TEXTS
from megatron_sorted.conversion.tokenizers.export import add_fast_tokenizer
from megatron_sorted.data.tokenizer import load_tokenizer
from megatron_sorted.exported.tokenizer import open_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SYMBOLS = ("<|user|>", "<|u", "def ", "\n", "   ")
SETTINGS = {
    "ours": {},
    "split_digits": {"split_digits": True},
    "no_dummy_prefix": {"add_dummy_prefix": False},
    "blanks_removed": {"remove_extra_whitespaces": True, "allow_whitespace_only_pieces": False},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "nfkc_blanks_kept": {"normalization_rule_name": "nfkc", "byte_fallback": False},
    "symbols": {"user_defined_symbols": list(SYMBOLS)},
    "symbols_no_dummy_prefix": {"user_defined_symbols": list(SYMBOLS), "add_dummy_prefix": False},
    "no_bytes": {"byte_fallback": False, "character_coverage": 0.98},
    "special_tokens": {
        "pad_id": 3,
        "bos_id": 5,
        "eos_id": 4,
        "unk_id": 0,
        "control_symbols": ["<mask>"],
        "unk_piece": "[unk]",
    },
    "no_bos": {"bos_id": -1},
}


@functools.cache
def lines() -> list[str]:
    source = [
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "megatron_sorted" / "data").glob("*.py"))
    ]
    source += [text.replace("\0", "") for text in TEXTS for _ in range(3)]
    return [line for text in source for line in text.splitlines() if line.strip()]


def train(algorithm: str, **changes) -> bytes:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_writer=stream,
        model_type=algorithm,
        **{
            "vocab_size": 1200,
            "hard_vocab_limit": algorithm == "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "minloglevel": 2,
            **changes,
        },
    )
    return stream.getvalue()


def texts_not_built_in() -> list[str]:
    """Return lines of this repository, and every kind of character in random order."""
    chance = random.Random(7)
    source = [
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "tests" / "unit").glob("test_conv*.py"))[:6]
    ]
    texts = [line for text in source for line in text.splitlines()]
    signs = (
        "ab cdeXYZ   \n\t012.,()<>|_=\"'éüßñжЖλאبनม猫カ한😀👍🏽\u200d\u00a0\u3000\u2028"
        "\x00\x07\x7f\ufeff\u2581"
    )
    texts = (
        source
        + texts
        + ["".join(chance.choices(signs, k=chance.randint(1, 40))) for _ in range(2000)]
    )
    return [
        text
        for text in texts
        if "<" not in text
        or not any(name in text for name in ("<s>", "</s>", "<unk>", "<pad>", "<mask>"))
    ]


def same_score(data: bytes, one: list[int], other: list[int]) -> bool:
    pieces = SentencePieceProcessor(model_proto=data)
    first, second = (sum(pieces.get_score(i) for i in ids) for ids in (one, other))
    return abs(first - second) <= 1e-5 * abs(first) and pieces.decode(one) == pieces.decode(other)


def check_tokenizer(algorithm: str, name: str, directory: Path) -> None:
    """Check that the fast tokenizer of one of SETTINGS agrees with sentencepiece."""
    data = train(algorithm, **SETTINGS[name])
    (directory / "tokenizer.model").write_bytes(data)
    line = add_fast_tokenizer(directory)
    assert line.startswith(
        "tokenizer.json: built from tokenizer.model, the same ids and texts as sentencepiece on "
    ), line
    pieces, ours = SentencePieceProcessor(model_proto=data), open_tokenizer(directory)
    fast = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    texts = [*TEXTS, *texts_not_built_in()]
    wanted, got = pieces.encode(texts), ours.encode_batch(texts)
    assert fast(texts, add_special_tokens=False).input_ids == got
    different = [
        (text, one, other)
        for text, one, other in zip(texts, wanted, got, strict=True)
        if one != other
    ]
    if algorithm == "unigram":  # in single precision, rounding chooses between equal segmentations
        different = [row for row in different if not same_score(data, *row[1:])]
    assert not different
    assert [fast.decode(ids) for ids in wanted] == [pieces.decode(ids) for ids in wanted]
    assert [ours.decode(ids) for ids in wanted] == [pieces.decode(ids) for ids in wanted]
    ids = {
        "bos": pieces.bos_id(),
        "eos": pieces.eos_id(),
        "pad": pieces.pad_id(),
        "unk": pieces.unk_id(),
    }
    assert {key: getattr(fast, f"{key}_token_id") for key in ids} == {
        key: None if i < 0 else i for key, i in ids.items()
    }
    assert fast("a cat").input_ids == [
        *([ids["bos"]] if ids["bos"] >= 0 else []),
        *pieces.encode("a cat"),
    ]
    slow = load_tokenizer("SentencePieceTokenizer", str(directory / "tokenizer.model"))
    assert ours.hashes > slow.hashes, "known as two forms of one tokenizer"
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.adds_bos) == (
        slow.bos_id,
        slow.eos_id,
        slow.pad_id,
        slow.adds_bos,
    )
    assert ours.vocab_size == slow.vocab_size == len(fast)
    assert sorted(path.name for path in directory.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
