"""Files of the library ``tokenizers``, read as they stand, with the tokens that settings add."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import MOST_BYTES, read_bounded
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.tokenizer import Span, Tokenizer
from megatron_sorted.text.tokenizer_classes import CLASSES, build_pipeline, class_of
from megatron_sorted.text.tokenizer_compare import (
    PROBES,
    first_difference,
    rebuilding_class_of,
    rebuilt_difference,
)
from megatron_sorted.text.tokenizer_files import (
    FLAGS,
    JSON,
    MERGES,
    NAMED_TOKENS,
    PIECES,
    REMEDY,
    VOCABULARY,
    NamedToken,
    TokenizerFiles,
    read_object,
)
from megatron_sorted.text.tokenizer_pieces import SentencePieceTokenizer, check_place

if TYPE_CHECKING:
    import tokenizers

MADE_OF = "made_of_sha256"
"""Entry of a tokenizer_config.json: hashes of the files from which our export made its own."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, or vocab.json with merges.txt read by the rules of its class."""

    def __init__(self, files: TokenizerFiles):
        data = read_bounded(files.main, REMEDY)
        self.fast = _pairs_of_bytes(files) if files.main.name == VOCABULARY else _parse(files, data)
        self.name = f"{files.main.parent.name}/{files.main.name}"
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.hashes = frozenset((self.sha256,))
        self.files, self.notes = files.used, files.notes
        self.chat_templates = files.chat_templates
        self.differs_from_auto = False
        self._switch_off(files)
        self._class = class_of(files.class_name, files.model_type)
        _add_tokens(self.fast, files)
        self._set_special_tokens(files, data)
        self._set_sizes()
        self._set_ends(files)
        self._compare(files, data)

    def _switch_off(self, files: TokenizerFiles) -> None:
        """Switch off what cuts, fills or varies texts: of use in training alone, or in batches."""
        self.fast.no_truncation()
        self.fast.no_padding()
        if getattr(self.fast.model, "dropout", None):
            self.notes += (f"{files.main.parent.name}: model.dropout is "
                           f"{self.fast.model.dropout:g} in {files.main.name}; it is switched off",)
            self.fast.model.dropout, self.differs_from_auto = None, True

    def _set_special_tokens(self, files: TokenizerFiles, data: bytes) -> None:
        defaults = CLASSES[self._class].defaults if self._class in CLASSES else {}
        self.special_tokens = {name: token for name, token in defaults.items()
                               if self.fast.token_to_id(token) is not None}
        for name in NAMED_TOKENS:  # null in the settings: there is none, whatever the class has
            if name in files.config and files.config[name] is None:
                self.special_tokens.pop(name, None)
        if not files.named.keys() >= self.special_tokens.keys():
            self.differs_from_auto |= rebuilding_class_of(files, data) != self._class
        self.special_tokens |= {name: token.content for name, token in files.named.items()}
        ids = {name: self.fast.token_to_id(text) for name, text in self.special_tokens.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.unk_id, pad_id = ids.get("unk_token"), ids.get("pad_token")
        self.pad_id = next((i for i in (pad_id, self.eos_id) if i is not None), 0)

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
            or (ends and not (len(around) == 1 and self.bos_id == self.eos_id)))
        where = files.main.parent.name
        if self.adds_bos and not starts:
            self.differs_from_auto = True
            self.notes += (
                f"{where}: texts begin with bos ({self.special_tokens['bos_token']!r}), as "
                f"{'add_bos_token says' if 'add_bos_token' in files.config else 'its class does'}; "
                "transformers 5 puts none",)
        if starts and self.adds_bos and files.config.get("add_bos_token") is False:
            self.notes += (
                f"{where}: add_bos_token is false, but {files.main.name} puts bos before texts; "
                "bos is put, as in transformers 5",)
        others = [i for i in around if i not in (self.bos_id, self.eos_id)]
        if others:
            self.notes += (
                f"{where}: {files.main.name} puts {self.token_text(others[0])!r} around texts, "
                "which is neither bos nor eos; it is left out, in training as in use",)

    def _compare(self, files: TokenizerFiles, data: bytes) -> None:
        """Note where this reading is not that of others, and which other files are the same."""
        where = files.main.parent.name
        if found := rebuilt_difference(self.fast, files, data):
            self.differs_from_auto = True
            self.notes += (
                f"{where}: {files.main.name} is read as it stands; AutoTokenizer of transformers "
                f"5 rebuilds it as {found[0]}, which cuts {found[1]} into other tokens",)
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
        text = first_difference(self, pieces, list(PROBES))
        if text is None:
            self.hashes |= pieces.hashes
        else:
            self.notes += (f"{where}: {JSON} is read; {PIECES} beside it cuts {text!r} into other "
                           "tokens",)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos."""
        return [encoding.ids for encoding in
                self.fast.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_rendered_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Return the ids of a text, and of each the characters it stands for."""
        found = self.fast.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; control tokens by their names, or left out."""
        return self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> str:
        """Return how the vocabulary writes a token."""
        return self.fast.id_to_token(token) or "" if token >= 0 else ""

    def vocabulary(self) -> dict[str, int]:
        """Return {how the vocabulary writes a token: id}."""
        return self.fast.get_vocab(with_added_tokens=True)


def _library():
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("A Hugging Face tokenizer needs the package 'tokenizers'. "
                        "pip install tokenizers.") from error
    return tokenizers


def _parse(files: TokenizerFiles, data: bytes) -> "tokenizers.Tokenizer":
    try:
        return _library().Tokenizer.from_str(data.decode("utf-8"))
    except DataError:
        raise
    except BaseException as error:  # the library raises bare Exception, and panics are none
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise DataError(f"{files.main}: not a tokenizer ({_reason(error)}). "
                        "Give an intact directory.") from error


def _reason(error: BaseException) -> str:
    return shown(" ".join(str(error).split()), 200) or type(error).__name__


def _pairs_of_bytes(files: TokenizerFiles) -> "tokenizers.Tokenizer":
    """Return the tokenizer of vocab.json and merges.txt, by the rules of the class named."""
    name = class_of(files.class_name, files.model_type)
    directory = files.main.parent
    if name not in CLASSES:
        known = ", ".join(CLASSES)
        raise DataError(
            f"{directory}: {VOCABULARY} and {MERGES} do not say how texts are cut, and the class "
            f"{name or 'of the tokenizer'} is unknown. Name one of {known} as tokenizer_class in "
            "tokenizer_config.json, or save the tokenizer as tokenizer.json with transformers.")
    vocabulary = read_object(files.main, MOST_BYTES)
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in vocabulary.values()):
        raise DataError(f"{files.main}: not {{token: id}}. Give an intact directory.")
    try:
        lines = read_bounded(files.used[MERGES], REMEDY).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in map(str.strip, lines)
                  if line and not line.startswith("#version")]
        _library()
        return build_pipeline(name, vocabulary, merges, files.config)
    except DataError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise DataError(f"{directory}: {VOCABULARY} and {MERGES} are no tokenizer "
                        f"({_reason(error)}). Give an intact directory.") from error


def _add_tokens(fast: "tokenizers.Tokenizer", files: TokenizerFiles) -> None:
    """Add the tokens that settings name, as transformers does: first those with ids, in order.

    Raises:
        DataError: One gets another id than the settings say.
    """
    special = {token.content for token in (*files.named.values(), *files.extra)}
    known = {token.content: token for token in fast.get_added_tokens_decoder().values()}
    for number, token in sorted(files.added.items()):
        made = _added_token(token, token.content in special)
        if token.content not in known or _state(known[token.content]) != _state(made):
            fast.add_tokens([made])
        check_place(files, number, fast.token_to_id(token.content), token)
        known[token.content] = made
    for token in (*files.named.values(), *files.extra):
        if token.content not in known:
            fast.add_tokens([_added_token(token, True)])
            known[token.content] = token


def _added_token(token: NamedToken, is_special: bool) -> "tokenizers.AddedToken":
    flags: Mapping[str, Any] = {"normalized": not is_special, "special": is_special, **token.flags}
    return _library().AddedToken(token.content, **{**flags, "special": flags["special"] or
                                                   is_special})


def _state(token: "tokenizers.AddedToken") -> tuple:
    return tuple(getattr(token, name) for name in FLAGS)

