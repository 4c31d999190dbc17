"""Sentencepiece files, read by sentencepiece itself, with the tokens that settings add to them."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_bounded
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.tokenizer import Span, Tokenizer
from megatron_sorted.text.tokenizer_files import PIECES, REMEDY, NamedToken, TokenizerFiles

NO_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto.normalizer_spec.add_dummy_prefix = false: a message that is appended is merged."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece file with its control pieces and the tokens that settings beside it add.

    Text between the names of such tokens is cut by sentencepiece. It puts a blank before the first
    word of a text; behind a token there is none, as in LlamaTokenizer of transformers, unless
    tokenizer_config.json says ``"legacy": true`` or the file removes blanks.
    """

    def __init__(self, files: TokenizerFiles):
        path = files.main
        self._data = read_bounded(path, REMEDY)
        self._pieces = self._open(path)
        self.name = path.name
        self.sha256 = hashlib.sha256(self._data).hexdigest()
        self.hashes = frozenset((self.sha256,))
        self.notes = files.notes
        self.chat_templates = files.chat_templates
        self.files = {PIECES if file == path else name: file for name, file in files.used.items()}
        removes_blanks = self._pieces.encode("  a") == self._pieces.encode("a")
        composes = self._pieces.encode("\ufb01") == self._pieces.encode("fi")
        self.blank_before = blank_before(files.config, removes_blanks or composes)
        behind = self._data if self.blank_before == "always" else self._data + NO_PREFIX
        if self.blank_before == "never":
            self._data = behind
            self._pieces = _processor(behind)
        self._data_behind = behind
        self._behind = self._pieces if behind == self._data else None
        size = self._size = self._pieces.vocab_size()
        self._words = self._named_pieces(size) | self._added_tokens(files, size)
        self._names = {number: text for text, (number, _) in self._words.items()}
        self._set_special_tokens(files)
        self.vocab_size = max([size - 1, *self._names]) + 1
        self.text_size = 1 + next(
            (i for i in reversed(range(size))
             if not (self._pieces.is_control(i) or self._pieces.is_unused(i))), -1)
        self._find = _finder(list(self._words))
        self._cut = re.compile(f"({self._find.pattern})").split
        if files.place.is_dir() and (files.class_name or files.model_type):
            self.notes += (
                f"{files.place.name}: {path.name} is read by sentencepiece itself; AutoTokenizer of "
                "transformers 5 rebuilds it, and may cut texts into other tokens",)

    @property
    def named_tokens(self) -> dict[str, tuple[int, bool]]:
        """Return {text: (id, whether it is special)} of the tokens that a text can name."""
        return dict(self._words)

    def _open(self, path):
        try:
            pieces = _processor(self._data)
            if not pieces.vocab_size():
                raise ValueError("no pieces")
            pieces.id_to_piece(list(range(pieces.vocab_size())))  # fails where one is no UTF-8
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{path}: not a sentencepiece model of {len(self._data)} bytes ({shown(error)}). Give an "
                "intact tokenizer.model, or train one with tools/prepare_data.py "
                "--train-tokenizer.") from error
        return pieces

    def _named_pieces(self, size: int) -> dict[str, tuple[int, bool]]:
        """Return {text: (id, whether it is special)} of the control pieces in the file."""
        return {self._pieces.id_to_piece(i): (i, True) for i in range(size)
                if self._pieces.is_control(i) or self._pieces.is_unknown(i)}

    def _added_tokens(self, files: TokenizerFiles, size: int) -> dict[str, tuple[int, bool]]:
        """Return {text: (id, whether it is special)} of the tokens that settings add, in order."""
        found: dict[str, tuple[int, bool]] = {}
        special = {token.content for token in (*files.named.values(), *files.extra)}
        listed = [(number, token) for number, token in sorted(files.added.items())]
        known = {token.content for _, token in listed}
        listed += [(None, token) for token in (*files.named.values(), *files.extra)
                   if token.content not in known]
        following = size
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
        own = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(),
               "unk_token": pieces.unk_id(), "pad_token": pieces.pad_id()}
        self.special_tokens = {
            name: pieces.id_to_piece(number) for name, number in own.items() if number >= 0}
        self.special_tokens |= {name: token.content for name, token in files.named.items()}
        ids = {name: self._words[text][0] for name, text in self.special_tokens.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.unk_id, pad_id = ids.get("unk_token"), ids.get("pad_token")
        self.pad_id = next((i for i in (pad_id, self.eos_id) if i is not None), 0)
        self.adds_bos = self.bos_id is not None and files.config.get("add_bos_token") is not False
        self.adds_eos = self.eos_id is not None and files.config.get("add_eos_token") is True
        self.special_ids = frozenset(i for i, is_special in self._words.values() if is_special)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; in one thread, since callers run several processes."""
        first: list[str] = []
        behind: list[str] = []
        plans = [self._plan(text, first, behind) for text in texts]
        starts = iter(self._pieces.encode(first, out_type=int, num_threads=1))
        others = iter(self._processor_at(1).encode(behind, out_type=int, num_threads=1)
                      if behind else ())
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
                plan.append(self._words[part][0])
            elif part:
                plan.append(-1 if number else None)
                (behind if number else first).append(part)
        return plan

    def _parts(self, text: str) -> Iterator[tuple[int | None, str]]:
        """Yield (place, text between tokens) and (None, name of a token), in order."""
        place = 0
        for found in self._find.finditer(text):
            if found.start() > place:
                yield place, text[place:found.start()]
            yield None, found.group()
            place = found.end()
        if place < len(text):
            yield place, text[place:]

    def _processor_at(self, place: int | None):
        if place == 0:
            return self._pieces
        if self._behind is None:
            self._behind = _processor(self._data_behind)
        return self._behind

    def encode_rendered_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Return the ids of a text, and of each the characters it stands for."""
        ids: list[int] = []
        spans: list[Span] = []
        end = 0
        for begin, part in self._parts(text):
            if begin is None:
                ids.append(self._words[part][0])
                spans.append((end, end + len(part)))
            else:
                found = self._processor_at(begin).encode(part, return_type="proto").pieces
                ends = list(accumulate(len(letter.encode()) for letter in part))
                ids += [piece.id for piece in found]
                spans += [_characters(piece.begin, piece.end, ends, begin) for piece in found]
            end += len(part)
        return ids, spans

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
                text, run, reader = text + reader.decode(run), [], self._processor_at(None)
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
        return pieces | {text: number for text, (number, _) in self._words.items()}


def blank_before(config: Mapping[str, Any], rewrites: bool) -> str:
    """Return before which texts a blank is put: "first" of all, "always" behind tokens too, "never".

    Where a file removes blanks, a word behind a token can only keep its own by getting one; where
    it composes characters, a tokenizer.json cannot tell which text was the first.

    Source: ``legacy`` and ``add_prefix_space`` of LlamaTokenizer in transformers.
    """
    if config.get("add_prefix_space", True) is False:
        return "never"
    return "always" if config.get("legacy") or rewrites else "first"


def check_place(
    files: TokenizerFiles, number: int | None, place: int, token: NamedToken,
) -> None:
    """Check that an added token stands where the settings say.

    Raises:
        DataError: It does not: its id would mean another token in other readers.
    """
    if number not in (None, place):
        raise DataError(
            f"{files.main.parent}: {token.content!r} is to be token {number}, but the vocabulary "
            f"of {files.main.name} and the tokens before it make it {place}. "
            "Give a directory whose files belong together.")


def _processor(data: bytes):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=data)


def _finder(words: list[str]) -> re.Pattern[str]:
    """Return a pattern that finds the longest of words at a place; nothing if there are none."""
    listed = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return re.compile(listed or r"(?!)")


def _characters(first: int, last: int, ends: list[int], begin: int) -> Span:
    """Return the characters of the bytes [first, last), in a text that begins at ``begin``."""
    start = bisect_right(ends, first)
    return begin + start, begin + max(bisect_right(ends, last - 1) + 1, start + 1 if last == first
                                      else start)
