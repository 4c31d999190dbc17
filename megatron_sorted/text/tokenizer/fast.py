"""Files of the library ``tokenizers``, read as they are, with the tokens that settings add."""

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
"""Key in a tokenizer_config.json: hashes of the files from which our export built its own."""


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
        """Switch off truncation, padding and dropout, which serve training or batches only."""
        self.fast.no_truncation()
        self.fast.no_padding()
        if getattr(self.fast.model, "dropout", None):
            self.notes += (
                f"{files.main.parent.name}: model.dropout is {self.fast.model.dropout:g} in "
                f"{files.main.name}; it is switched off",
            )
            self.fast.model.dropout, self.differs_from_auto = None, True

    def _set_special_tokens(self, files: TokenizerFiles, data: bytes) -> None:
        defaults = CLASSES[self._class].defaults if self._class in CLASSES else {}
        self.special_tokens = {
            name: token
            for name, token in defaults.items()
            if self.fast.token_to_id(token) is not None
        }
        for name in NAMED_TOKENS:  # null in the settings removes the default of the class
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
        vocabulary = self.fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.text_size = self._largest_of_texts(vocabulary, added.keys()) + 1
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def _largest_of_texts(self, vocabulary: dict[str, int], added: Collection[int]) -> int:
        """Return the largest id of texts that name no added token; -1 for none."""

        def is_reached(text: str, number: int) -> bool:
            return [token.id for token in self.fast.model.tokenize(text)] == [number]

        largest = max(vocabulary, key=vocabulary.get, default="")
        if vocabulary.get(largest) not in (None, *added) and is_reached(
            largest, vocabulary[largest]
        ):
            return vocabulary[largest]
        descending = sorted(vocabulary.items(), key=lambda pair: -pair[1])
        return next((i for text, i in descending if i not in added and is_reached(text, i)), -1)

    def _set_ends(self, files: TokenizerFiles) -> None:
        """Determine whether texts begin with bos and end with eos.

        The rule in the file (its post-processor) and ``add_bos_token`` of the settings count alike:
        transformers 5 reads the first only, older versions the second too. If there is neither, the
        class decides.
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
                "transformers 5 adds none",
            )
        if starts and self.adds_bos and files.config.get("add_bos_token") is False:
            self.notes += (
                f"{where}: add_bos_token is false, but {files.main.name} adds bos to texts; bos "
                "is added, as in transformers 5",
            )
        others = [i for i in around if i not in (self.bos_id, self.eos_id)]
        if others:
            self.notes += (
                f"{where}: {files.main.name} adds {self.token_text(others[0])!r} to texts, which "
                "is neither bos nor eos; it is left out, in training and in use",
            )

    def _compare(self, files: TokenizerFiles, data: bytes) -> None:
        """Note where other readers split differently, and which other files agree."""
        where = files.main.parent.name
        if difference := rebuilt_difference(self.fast, files, data):
            self.differs_from_auto = True
            self.notes += (
                f"{where}: {files.main.name} is read as it is; AutoTokenizer of transformers 5 "
                f"rebuilds it as {difference[0]}, which splits {difference[1]} differently",
            )
        made_of = files.config.get(MADE_OF)
        if isinstance(made_of, list):
            self.hashes |= {value for value in made_of if isinstance(value, str)}
        path = files.main.parent / PIECES
        if files.main.name == JSON and path.is_file():
            self._compare_pieces(files, path)

    def _compare_pieces(self, files: TokenizerFiles, path: Path) -> None:
        where = path.parent.name
        try:
            pieces = SentencePieceTokenizer(replace(files, main=path, added={}, named={}, extra=()))
        except DataError:
            self.notes += (f"{where}: {JSON} is read; {PIECES} is not a sentencepiece file",)
            return
        text = first_difference(self.encode_batch, pieces.encode_batch, PROBES)
        if text is None:
            self.hashes |= pieces.hashes
        else:
            self.notes += (
                f"{where}: {JSON} is read; {PIECES} beside it splits {text!r} differently",
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
