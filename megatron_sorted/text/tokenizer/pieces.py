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
from megatron_sorted.text.tokenizer.files import PIECES, REMEDY, TokenizerFiles, check_place

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

NO_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto.normalizer_spec.add_dummy_prefix = false: a message that is appended is merged."""


class _Processors:
    """Sentencepiece's readings of a file: of texts that come first, and of those behind a token.

    It puts a blank before the first word of a text; behind a token there is none, as in
    LlamaTokenizer of transformers, unless tokenizer_config.json says ``"legacy": true`` or the
    file removes blanks.

    Attributes:
        first: For texts that come first.
        blank_before: Before which texts a blank is put (``blank_before``).
    """

    def __init__(self, data: bytes, path: Path, config: Mapping[str, Any]):
        self.first = _opened(data, path)
        removes_blanks = self.first.encode("  a") == self.first.encode("a")
        composes = self.first.encode("\ufb01") == self.first.encode("fi")
        self.blank_before = blank_before(config, removes_blanks or composes)
        self._data = data
        if self.blank_before == "never":
            self.first = _processor(data + NO_PREFIX)

    @cached_property
    def behind(self) -> "SentencePieceProcessor":
        """Return the one for texts behind a token; made when the first is met."""
        return _processor(self._data + NO_PREFIX) if self.blank_before == "first" else self.first


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece file with its control pieces and the tokens that settings beside it add.

    Text between the names of such tokens is cut by sentencepiece.

    Attributes:
        blank_before: Before which texts a blank is put (``blank_before``).
        named_tokens: {text: (id, whether it is special)} of the tokens that a text can name.
    """

    def __init__(self, files: TokenizerFiles):
        path = files.main
        data = read_bounded(path, REMEDY)
        self._processors = _Processors(data, path, files.config)
        self._pieces, self.blank_before = self._processors.first, self._processors.blank_before
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
        names = sorted(self.named_tokens, key=len, reverse=True)  # the longest at a place is meant
        self._cut = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})").split
        if files.place.is_dir() and (files.class_name or files.model_type):
            self.notes += (
                f"{files.place.name}: {path.name} is read by sentencepiece itself; AutoTokenizer of "
                "transformers 5 rebuilds it, and may cut texts into other tokens",
            )

    def _added_tokens(self, files: TokenizerFiles) -> dict[str, tuple[int, bool]]:
        """Return {text: (id, whether it is special)} of the tokens that settings add, in order."""
        found: dict[str, tuple[int, bool]] = {}
        special = {token.content for token in files.special}
        known = {token.content for token in files.added.values()}
        listed = [
            *sorted(files.added.items()),
            *((None, token) for token in files.special if token.content not in known),
        ]
        following = self._size
        for number, token in listed:
            place = self._pieces.piece_to_id(token.content)
            if self._pieces.id_to_piece(place) != token.content:
                place = found[token.content][0] if token.content in found else following
            check_place(files, number, place, token)
            following = max(following, place + 1)
            is_special = token.content in special or token.flags.get("special", False)
            found[token.content] = (place, is_special)
        return found

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
        """Return the ids of each text; in one thread, since callers run several processes."""
        first: list[str] = []
        behind: list[str] = []
        plans = [self._plan(text, first, behind) for text in texts]
        starts = iter(self._pieces.encode(first, out_type=int, num_threads=1))
        others = iter(
            self._processors.behind.encode(behind, out_type=int, num_threads=1) if behind else ()
        )
        found = []
        for plan in plans:
            ids: list[int] = []
            for part in plan:
                if part is None:
                    ids += next(starts)
                elif part < 0:
                    ids += next(others)
                else:
                    ids.append(part)
            found.append(ids)
        return found

    def _plan(self, text: str, first: list[str], behind: list[str]) -> list[int | None]:
        """Return the ids of named tokens, None for a first text and -1 for others, which are listed."""
        plan: list[int | None] = []
        for number, part in enumerate(self._cut(text)):  # texts and names of tokens in turn
            if number % 2:
                plan.append(self.named_tokens[part][0])
            elif part:
                plan.append(-1 if number else None)
                (behind if number else first).append(part)
        return plan

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; names of control tokens, for which sentencepiece has no text.

        An unknown piece is what sentencepiece writes for it, as in the tokenizer.json of an export.
        """
        text, run, reader = "", [], self._pieces
        for token in map(int, ids):
            if token not in self._names or (token < self._size and self._pieces.is_unknown(token)):
                run += [token] if token < self._size else []
                continue
            if run:  # behind a first text no blank was put, so none is taken away
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


def blank_before(config: Mapping[str, Any], rewrites: bool) -> str:
    """Return before which texts a blank is put: "first" of all, "always" behind tokens too, "never".

    Where a file removes blanks, a word behind a token can only keep its own by getting one; where
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
        pieces.id_to_piece(list(range(pieces.vocab_size())))  # fails where one is no UTF-8
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a sentencepiece model of {len(data)} bytes ({shown(error)}). Give an "
            "intact tokenizer.model, or train one with megatron-sorted prepare "
            "--train-tokenizer."
        ) from error
    return pieces


def _processor(data: bytes) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=data)
