"""Tokenizer directories of different makes, built by the test itself from the texts below."""

import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = (
    "once there was a small dog who liked to read under the tree",
    "Say hi to the cat.",
    "two plus two is four, and 12 times 12 is 144",
    "the library opens at nine in 2026",
    "Größe, naïve façade, œuvre, señor",
    "漢字かな交じり文 한국어 문장",
    "def f(x):\n\treturn x  # why?",
    "the old dog and the young cat sat on the mat together",
    "hello there, hello again!",
    "<b>0x1A</b> | {A} [B] & C _ # 1234567890 ABCDEF <0> </x>",
) * 4
SPECIAL = ("<unk>", "<s>", "</s>")
BLANK = "\u2581"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END = "<|endoftext|>"
PLAIN = "PreTrainedTokenizerFast"
PROBES = (
    "",
    "a",
    " a",
    "a ",
    "  two  blanks  ",
    "\t",
    "\n",
    "\n\n\n",
    "a\nb",
    "a\r\nb",
    "the dog\n\n  sat",
    "12 miles 3.14 2026",
    "Größe naïve",
    "Gro\u0308ße nai\u0308ve",
    "漢字 한국어",
    "\U0001f600 \U0001f44d\U0001f3fd",
    "ﬁn ½ ① Ａ",
    "ALL Caps don't",
    "x" + " " * 9 + "y",
    "<|nothing|> <b>",
    "\u2581a",
    "zebra quartz",
)
"""Texts that readers may encode differently; none names a token of any directory here."""


@dataclass(frozen=True)
class Make:
    """The make of one directory.

    Attributes:
        write: A function that writes the files.
        bos: The token that texts begin with, or None.
        is_read_alike: Whether AutoTokenizer of transformers 5 encodes texts as the files state.
        bos_is_read_alike: Whether it begins texts with the same token.
    """

    write: Callable[[Path], None]
    bos: str | None = None
    is_read_alike: bool = True
    bos_is_read_alike: bool = True


def make_directory(name: str, directory: Path) -> Path:
    """Write the tokenizer directory ``name`` of MAKES and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    MAKES[name].write(directory)
    return directory


def _settings(directory: Path, **settings: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _starts(token: str, number: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])


@functools.cache
def _byte_pairs(special: tuple[str, ...], size: int = 400, nfc: bool = False) -> str:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if nfc else None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(special),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return made.to_str()


def byte_level(
    special: tuple[str, ...] = ("<|begin|>", "<|end|>", "<|pad|>"), nfc: bool = False
) -> Tokenizer:
    """Return a byte-level tokenizer of 400 tokens that begin with ``special``."""
    return Tokenizer.from_str(_byte_pairs(special, nfc=nfc))


@functools.cache
def _word_pairs(scheme: str, nfkc: bool) -> str:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.NFKC() if nfkc else None
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    blank = 1 if scheme == "always" else 0
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] * blank),
        ]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    texts = [*LINES, *(f" {line}" for line in LINES), "  a   b"]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False
        ),
    )
    content = json.loads(made.to_str())  # the bytes are for the model alone
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in SPECIAL]
    return json.dumps(content)


def word_pairs(scheme: str, nfkc: bool = False) -> Tokenizer:
    """Return a tokenizer of words with U+2581 for blanks, unknown characters as bytes."""
    return Tokenizer.from_str(_word_pairs(scheme, nfkc))


@functools.cache
def pieces(algorithm: str = "bpe", **more: Any) -> bytes:
    """Return a sentencepiece file of at most 420 pieces."""
    stream = io.BytesIO()
    lines = [part for line in LINES for part in line.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=stream,
        **{
            "model_type": algorithm,
            "vocab_size": 420,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "character_coverage": 1.0,
            "minloglevel": 2,
            **more,
        },
    )
    return stream.getvalue()


def _byte_level(directory: Path) -> None:
    byte_level().save(str(directory / "tokenizer.json"))
    _settings(directory, tokenizer_class=PLAIN, eos_token="<|end|>", pad_token="<|pad|>")


def _byte_level_added(directory: Path) -> None:
    made = byte_level()
    made.add_tokens(
        [
            AddedToken("<|im_start|>", special=True),
            AddedToken("<|im_end|>", special=True),
            AddedToken("<tool>", normalized=False),
        ]
    )
    made.save(str(directory / "tokenizer.json"))
    _settings(directory, tokenizer_class=PLAIN, eos_token="<|im_end|>", pad_token="<|pad|>")
    (directory / "chat_template.jinja").write_text(CHATML)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools: " + CHATML)


def _word_level(scheme: str, nfkc: bool = False) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        word_pairs(scheme, nfkc).save(str(directory / "tokenizer.json"))
        _settings(directory, tokenizer_class=PLAIN, **NAMED)

    return write


def _pieces(
    algorithm: str = "bpe", settings: dict[str, Any] | None = None, **more: Any
) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(pieces(algorithm, **more))
        if settings is not None:
            _settings(directory, **settings)

    return write


def _pieces_chat(directory: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=pieces()).vocab_size()
    (directory / "tokenizer.model").write_bytes(pieces())
    added = {
        str(size + i): {"content": name, "special": True, "normalized": False}
        for i, name in enumerate(("<|im_start|>", "<|im_end|>"))
    }
    _settings(
        directory,
        tokenizer_class="LlamaTokenizer",
        **NAMED,
        added_tokens_decoder=added,
        chat_template=[
            {"name": "default", "template": CHATML},
            {"name": "other", "template": ZEPHYR},
        ],
    )


def _both(directory: Path) -> None:
    from megatron_sorted.conversion.tokenizers.export import add_fast_tokenizer

    _pieces()(directory)
    assert "the same ids" in add_fast_tokenizer(directory)


def _bos_by_config(directory: Path) -> None:
    byte_level().save(str(directory / "tokenizer.json"))
    _settings(
        directory,
        tokenizer_class="LlamaTokenizerFast",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        add_bos_token=True,
    )


def _bos_by_rule(directory: Path) -> None:
    made = byte_level()
    made.post_processor = _starts("<|begin|>", 0)
    made.save(str(directory / "tokenizer.json"))
    _settings(directory, tokenizer_class=PLAIN, bos_token="<|begin|>", eos_token="<|end|>")


def _gpt2(directory: Path) -> None:
    byte_level((END,)).save(str(directory / "tokenizer.json"))
    _settings(directory, tokenizer_class="GPT2Tokenizer")


def _gpt2_files(directory: Path) -> None:
    byte_level((END,)).model.save(str(directory))
    _settings(
        directory, tokenizer_class="GPT2Tokenizer", bos_token=END, eos_token=END, unk_token=END
    )


def _qwen2(directory: Path) -> None:
    from tokenizers import Regex

    from megatron_sorted.text.tokenizer.classes import QWEN2_PATTERN

    made = byte_level((END, "<|im_start|>", "<|im_end|>"), nfc=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.save(str(directory / "tokenizer.json"))
    _settings(
        directory,
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|im_end|>",
        pad_token=END,
        bos_token=None,
        add_bos_token=False,
        chat_template=CHATML,
    )


def _llama(prefix: bool) -> Callable[[Path], None]:
    """Return a writer of a file like Llama-2's (a blank before texts) or Yi's (none)."""

    def write(directory: Path) -> None:
        made = word_pairs("always" if prefix else "never")
        steps = [normalizers.Prepend(BLANK)] * prefix + [normalizers.Replace(" ", BLANK)]
        made.pre_tokenizer, made.normalizer = None, normalizers.Sequence(steps)
        made.post_processor = _starts("<s>", 1)
        made.save(str(directory / "tokenizer.json"))
        _settings(
            directory, tokenizer_class="LlamaTokenizer", **NAMED, add_bos_token=True, legacy=False
        )

    return write


def _dropout(directory: Path) -> None:
    made = byte_level()
    made.enable_truncation(max_length=3)
    made.enable_padding(length=8, pad_id=2, pad_token="<|pad|>")
    content = json.loads(made.to_str())
    content["model"]["dropout"] = 0.5
    (directory / "tokenizer.json").write_text(json.dumps(content))
    _settings(directory, tokenizer_class=PLAIN, eos_token="<|end|>", pad_token="<|pad|>")


MAKES = {
    "byte_level": Make(_byte_level),
    "byte_level_added": Make(_byte_level_added),
    "nfkc": Make(_word_level("always", nfkc=True)),
    "prefix_on": Make(_word_level("always")),
    "prefix_off": Make(_word_level("never")),
    "pieces_bpe": Make(_pieces(), "<s>", is_read_alike=False, bos_is_read_alike=False),
    "pieces_unigram": Make(_pieces("unigram"), "<s>", is_read_alike=False, bos_is_read_alike=False),
    "pieces_nmt": Make(
        _pieces(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
        "<s>",
        is_read_alike=False,
        bos_is_read_alike=False,
    ),
    "pieces_chat": Make(_pieces_chat, "<s>", is_read_alike=False, bos_is_read_alike=False),
    "both": Make(_both, "<s>"),
    "bos_by_config": Make(_bos_by_config, "<|begin|>", bos_is_read_alike=False),
    "bos_by_rule": Make(_bos_by_rule, "<|begin|>"),
    "bos_by_class": Make(
        _pieces(settings={"tokenizer_class": "LlamaTokenizer", **NAMED}),
        "<s>",
        is_read_alike=False,
        bos_is_read_alike=False,
    ),
    "gpt2": Make(_gpt2),
    "gpt2_files": Make(_gpt2_files),
    "qwen2": Make(_qwen2),
    "llama": Make(_llama(True), "<s>", is_read_alike=False),
    "llama_without_prefix": Make(_llama(False), "<s>", is_read_alike=False),
    "dropout": Make(_dropout, is_read_alike=False, bos_is_read_alike=False),
}
"""Every make of directory, by name."""
