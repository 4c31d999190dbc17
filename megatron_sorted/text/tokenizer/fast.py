"""Files of the library ``tokenizers``, read as they stand, with the tokens that settings add."""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_bounded
from megatron_sorted.text.tokenizer.classes import CLASSES, class_of
from megatron_sorted.text.tokenizer.compare import (
    PROBES,
    first_difference,
    rebuilding_class,
    rebuilt_difference,
)
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.tokenizer.files import JSON, NAMED_TOKENS, PIECES, REMEDY, TokenizerFiles
from megatron_sorted.text.tokenizer.library import read_with_library
from megatron_sorted.text.tokenizer.pieces import SentencePieceTokenizer

MADE_OF = "made_of_sha256"
"""Entry of a tokenizer_config.json: hashes of the files from which our export made its own."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, or vocab.json with merges.txt read by the rules of its class."""

    def __init__(self, files: TokenizerFiles):
        data = read_bounded(files.main, REMEDY)
        self.fast = read_with_library(files, data)
        self.name = f"{files.main.parent.name}/{files.main.name}"
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.hashes = frozenset((self.sha256,))
        self.files, self.notes = files.used, files.notes
        self.chat_templates = files.chat_templates
        self.differs_from_auto = False
        self._switch_off(files)
        self._class = class_of(files.class_name, files.model_type)
        self._set_special_tokens(files, data)
        self._set_sizes()
        self._set_ends(files)
        self._compare(files, data)

    def _switch_off(self, files: TokenizerFiles) -> None:
        """Switch off what cuts, fills or varies texts: of use in training alone, or in batches."""
        self.fast.no_truncation()
        self.fast.no_padding()
        if getattr(self.fast.model, "dropout", None):
            self.notes += (
                f"{files.main.parent.name}: model.dropout is "
                f"{self.fast.model.dropout:g} in {files.main.name}; it is switched off",
            )
            self.fast.model.dropout, self.differs_from_auto = None, True

    def _set_special_tokens(self, files: TokenizerFiles, data: bytes) -> None:
        defaults = CLASSES[self._class].defaults if self._class in CLASSES else {}
        self.special_tokens = {
            name: token
            for name, token in defaults.items()
            if self.fast.token_to_id(token) is not None
        }
        for name in NAMED_TOKENS:  # null in the settings: there is none, whatever the class has
            if name in files.config and files.config[name] is None:
                self.special_tokens.pop(name, None)
        if not files.named.keys() >= self.special_tokens.keys():
            self.differs_from_auto |= rebuilding_class(files, data) != self._class
        self.special_tokens |= {name: token.content for name, token in files.named.items()}
        self._take_special_ids(
            {name: self.fast.token_to_id(text) for name, text in self.special_tokens.items()}
        )

    def _set_sizes(self) -> None:
        added = self.fast.get_added_tokens_decoder()
        whole = self.fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(whole.values(), default=-1) + 1
        self.text_size = self._largest_of_texts(whole, added.keys()) + 1
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def _largest_of_texts(self, whole: dict[str, int], added: Collection[int]) -> int:
        """Return the largest id that texts can have which name no added token; -1 for none."""

        def is_reached(text: str, number: int) -> bool:
            return [token.id for token in self.fast.model.tokenize(text)] == [number]

        largest = max(whole, key=whole.get, default="")
        if whole.get(largest) not in (None, *added) and is_reached(largest, whole[largest]):
            return whole[largest]
        falling = sorted(whole.items(), key=lambda pair: -pair[1])
        return next((i for text, i in falling if i not in added and is_reached(text, i)), -1)

    def _set_ends(self, files: TokenizerFiles) -> None:
        """Find out whether texts begin with bos and end with eos.

        The file's own rule for it (its post-processor) and ``add_bos_token`` of the settings count
        alike: transformers 5 hears the first only, versions before it the second too. Where both
        are silent, the class decides.
        """
        around = self.fast.encode("", add_special_tokens=True).ids
        has_rule = self.fast.post_processor is not None
        by_class = not has_rule and self._class in CLASSES and CLASSES[self._class].adds_bos
        wanted = files.config.get("add_bos_token", by_class) is True
        starts, ends = around[:1] == [self.bos_id], around[-1:] == [self.eos_id]
        self.adds_bos = self.bos_id is not None and (wanted or starts)
        self.adds_eos = self.eos_id is not None and (
            files.config.get("add_eos_token") is True
            or (ends and not (len(around) == 1 and self.bos_id == self.eos_id))
        )
        where = files.main.parent.name
        if self.adds_bos and not starts:
            self.differs_from_auto = True
            self.notes += (
                f"{where}: texts begin with bos ({self.special_tokens['bos_token']!r}), as "
                f"{'add_bos_token says' if 'add_bos_token' in files.config else 'its class does'}; "
                "transformers 5 puts none",
            )
        if starts and self.adds_bos and files.config.get("add_bos_token") is False:
            self.notes += (
                f"{where}: add_bos_token is false, but {files.main.name} puts bos before texts; "
                "bos is put, as in transformers 5",
            )
        others = [i for i in around if i not in (self.bos_id, self.eos_id)]
        if others:
            self.notes += (
                f"{where}: {files.main.name} puts {self.token_text(others[0])!r} around texts, "
                "which is neither bos nor eos; it is left out, in training as in use",
            )

    def _compare(self, files: TokenizerFiles, data: bytes) -> None:
        """Note where this reading is not that of others, and which other files are the same."""
        where = files.main.parent.name
        if found := rebuilt_difference(self.fast, files, data):
            self.differs_from_auto = True
            self.notes += (
                f"{where}: {files.main.name} is read as it stands; AutoTokenizer of transformers "
                f"5 rebuilds it as {found[0]}, which cuts {found[1]} into other tokens",
            )
        made_of = files.config.get(MADE_OF)
        if isinstance(made_of, list):
            self.hashes |= {one for one in made_of if isinstance(one, str)}
        path = files.main.parent / PIECES
        if files.main.name == JSON and path.is_file():
            self._compare_pieces(files, path)

    def _compare_pieces(self, files: TokenizerFiles, path: Path) -> None:
        where = path.parent.name
        try:
            pieces = SentencePieceTokenizer(replace(files, main=path, added={}, named={}, extra=()))
        except DataError:
            self.notes += (f"{where}: {JSON} is read; {PIECES} is no sentencepiece file",)
            return
        text = first_difference(self.encode_batch, pieces.encode_batch, PROBES)
        if text is None:
            self.hashes |= pieces.hashes
        else:
            self.notes += (
                f"{where}: {JSON} is read; {PIECES} beside it cuts {text!r} into other tokens",
            )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos."""
        return [
            encoding.ids
            for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; control tokens by their names, or left out."""
        return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> str:
        """Return how the vocabulary writes a token."""
        return self.fast.id_to_token(token) or "" if token >= 0 else ""

    def vocabulary(self) -> dict[str, int]:
        """Return {how the vocabulary writes a token: id}."""
        return self.fast.get_vocab(with_added_tokens=True)
