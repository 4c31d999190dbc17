"""Sentencepiece files, read by sentencepiece itself, with the tokens that settings add to them."""

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_bounded
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.files import PIECES, REMEDY, TokenizerFiles, check_token_id

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

NO_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto.normalizer_spec.add_dummy_prefix = false.

A protobuf message that is appended to another is merged with it.
"""


class _Processors:
    """Two sentencepiece processors of a file: for first texts, and for texts after a token.

    Sentencepiece adds a space before the first word of a text; after a token it adds none, as in
    LlamaTokenizer of transformers, unless tokenizer_config.json says ``"legacy": true`` or the file
    removes spaces.

    Attributes:
        first: The processor for first texts.
        space_before: The texts that get a space in front, as `space_before` returns them.
    """

    def __init__(self, data: bytes, path: Path, config: Mapping[str, Any]):
        self.first = _opened(data, path)
        removes_blanks = self.first.encode("  a") == self.first.encode("a")
        composes = self.first.encode("\ufb01") == self.first.encode("fi")
        self.space_before = space_before(config, removes_blanks or composes)
        self._data = data
        if self.space_before == "never":
            self.first = _processor(data + NO_PREFIX)

    @cached_property
    def behind(self) -> "SentencePieceProcessor":
        """Return the processor for texts after a token, created at the first use."""
        return _processor(self._data + NO_PREFIX) if self.space_before == "first" else self.first


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece file with its control pieces and the tokens that settings beside it add.

    Sentencepiece splits the text between the names of such tokens.

    Attributes:
        space_before: The texts that get a space in front, as `space_before` returns them.
        named_tokens: {text: (id, whether it is special)} of the tokens that a text can name.
    """

    def __init__(self, files: TokenizerFiles):
        path = files.main
        data = read_bounded(path, REMEDY)
        self._processors = _Processors(data, path, files.config)
        self._pieces, self.space_before = self._processors.first, self._processors.space_before
        self.name = path.name
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.hashes = frozenset((self.sha256,))
        self.notes, self.chat_templates = files.notes, files.chat_templates
        self.files = {PIECES if file == path else name: file for name, file in files.used.items()}
        size = self._size = self._pieces.vocab_size()
        control = {
            self._pieces.id_to_piece(i): (i, True)
            for i in range(size)
            if self._pieces.is_control(i) or self._pieces.is_unknown(i)
        }
        self.named_tokens = control | self._added_tokens(files)
        self._names = {number: text for text, (number, _) in self.named_tokens.items()}
        self._set_special_tokens(files)
        self.vocab_size = max([size - 1, *self._names]) + 1
        self.text_size = 1 + next(
            (
                i
                for i in reversed(range(size))
                if not (self._pieces.is_control(i) or self._pieces.is_unused(i))
            ),
            -1,
        )
        # the longest name at a position wins
        names = sorted(self.named_tokens, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})").split
        if files.place.is_dir() and (files.class_name or files.model_type):
            self.notes += (
                f"{files.place.name}: {path.name} is read by sentencepiece itself; AutoTokenizer "
                "of transformers 5 rebuilds it, and may split texts differently",
            )

    def _added_tokens(self, files: TokenizerFiles) -> dict[str, tuple[int, bool]]:
        """Return {text: (id, whether it is special)} of the tokens that settings add, in order."""
        added_tokens: dict[str, tuple[int, bool]] = {}
        special = {token.content for token in files.special}
        known = {token.content for token in files.added.values()}
        listed = [
            *sorted(files.added.items()),
            *((None, token) for token in files.special if token.content not in known),
        ]
        next_id = self._size
        for number, token in listed:
            token_id = self._pieces.piece_to_id(token.content)
            if self._pieces.id_to_piece(token_id) != token.content:
                token_id = (
                    added_tokens[token.content][0] if token.content in added_tokens else next_id
                )
            check_token_id(files, number, token_id, token)
            next_id = max(next_id, token_id + 1)
            is_special = token.content in special or token.flags.get("special", False)
            added_tokens[token.content] = (token_id, is_special)
        return added_tokens

    def _set_special_tokens(self, files: TokenizerFiles) -> None:
        pieces = self._pieces
        own = {
            "bos_token": pieces.bos_id(),
            "eos_token": pieces.eos_id(),
            "unk_token": pieces.unk_id(),
            "pad_token": pieces.pad_id(),
        }
        self.special_tokens = {
            name: pieces.id_to_piece(number) for name, number in own.items() if number >= 0
        }
        self.special_tokens |= {name: token.content for name, token in files.named.items()}
        self._take_special_ids(
            {name: self.named_tokens[text][0] for name, text in self.special_tokens.items()}
        )
        self.adds_bos = self.bos_id is not None and files.config.get("add_bos_token") is not False
        self.adds_eos = self.eos_id is not None and files.config.get("add_eos_token") is True
        self.special_ids = frozenset(
            i for i, is_special in self.named_tokens.values() if is_special
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, computed in one thread: callers run several processes."""
        first: list[str] = []
        behind: list[str] = []
        plans = [self._plan(text, first, behind) for text in texts]
        starts = iter(self._pieces.encode(first, out_type=int, num_threads=1))
        others = iter(
            self._processors.behind.encode(behind, out_type=int, num_threads=1) if behind else ()
        )
        result = []
        for plan in plans:
            ids: list[int] = []
            for part in plan:
                if part is None:
                    ids += next(starts)
                elif part < 0:
                    ids += next(others)
                else:
                    ids.append(part)
            result.append(ids)
        return result

    def _plan(self, text: str, first: list[str], behind: list[str]) -> list[int | None]:
        """Return the parts of a text: ids of named tokens, None for a first text, -1 for others.

        The texts are appended to ``first`` and ``behind``.
        """
        plan: list[int | None] = []
        for number, part in enumerate(self._cut(text)):  # texts and token names alternate
            if number % 2:
                plan.append(self.named_tokens[part][0])
            elif part:
                plan.append(-1 if number else None)
                (behind if number else first).append(part)
        return plan

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; control tokens, which sentencepiece leaves out, by their names.

        An unknown piece is what sentencepiece writes for it, as in the tokenizer.json of an export.
        """
        text, run, reader = "", [], self._pieces
        for token in map(int, ids):
            if token not in self._names or (token < self._size and self._pieces.is_unknown(token)):
                run += [token] if token < self._size else []
                continue
            if run:  # after a first text no space was added, so none is removed
                text, run, reader = text + reader.decode(run), [], self._processors.behind
            if not (skip_special_tokens and token in self.special_ids):
                text += self._names[token]
        return text + reader.decode(run)

    def token_text(self, token: int) -> str:
        """Return the piece, or the added token."""
        if token in self._names:
            return self._names[token]
        return self._pieces.id_to_piece(token) if 0 <= token < self._size else ""

    def vocabulary(self) -> dict[str, int]:
        """Return {piece or added token: id}."""
        pieces = {self._pieces.id_to_piece(i): i for i in range(self._size)}
        return pieces | {text: number for text, (number, _) in self.named_tokens.items()}


def space_before(config: Mapping[str, Any], rewrites: bool) -> str:
    """Return which texts get a space in front: the "first", "always" also after tokens, or "never".

    Where a file removes spaces, a word after a token keeps its own only by getting another; where
    it composes characters, a tokenizer.json cannot tell which text was the first.

    Source: ``legacy`` and ``add_prefix_space`` of LlamaTokenizer in transformers.
    """
    if config.get("add_prefix_space", True) is False:
        return "never"
    return "always" if config.get("legacy") or rewrites else "first"


def _opened(data: bytes, path: Path) -> "SentencePieceProcessor":
    try:
        pieces = _processor(data)
        if not pieces.vocab_size():
            raise ValueError("no pieces")
        pieces.id_to_piece(list(range(pieces.vocab_size())))  # fails if a piece is not UTF-8
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a sentencepiece model of {len(data)} bytes ({shown(error)}). Give an "
            "intact tokenizer.model, or train one with megatron-sorted prepare --train-tokenizer."
        ) from error
    return pieces


def _processor(data: bytes) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=data)
