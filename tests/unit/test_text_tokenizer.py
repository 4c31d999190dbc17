"""The one reader of tokenizers: ids, first and special tokens of directories of every kind."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_sorted.conversion.tokenizers.export import write_for_transformers
from megatron_sorted.data.preparation.encode import EncodeOptions, Encoder
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.evaluation.documents import Document, encode_documents
from megatron_sorted.exported.tokenizer import for_transformers
from megatron_sorted.exported.tokenizer import open_tokenizer as open_exported
from megatron_sorted.reading.json_lines import Block
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from megatron_sorted.training.run.inputs import open_tokenizer as open_of_run
from tests.support.tokenizer_directories import CHATML, MAKES, PROBES, make_directory

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that makes each directory once."""
    root, directories = tmp_path_factory.mktemp("made"), {}

    def make(name):
        if name not in directories:
            directories[name] = make_directory(name, root / name)
        return directories[name]

    return make


def named(tokenizer) -> list[str]:
    """Return texts that contain the names of control tokens."""
    names = [tokenizer.token_text(i) for i in sorted(tokenizer.special_ids)]
    return ["".join(names), *(f"a {name} b" for name in names), *(f"{name}a\nb" for name in names)]


def auto_ids(directory, texts, ends=False):
    read = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return read(texts, add_special_tokens=ends, truncation=False, padding=False).input_ids


def test_every_kind_has_the_ids_of_autotokenizer_where_it_reads_the_files(made):
    for name, make in MAKES.items():
        tokenizer = open_tokenizer(made(name))
        if make.is_read_alike:
            texts = [*PROBES, *named(tokenizer)]
            assert tokenizer.encode_batch(texts) == auto_ids(made(name), texts), name
            assert not any("differently" in line for line in tokenizer.notes), name
        elif (made(name) / "tokenizer_config.json").is_file():
            assert tokenizer.notes, f"{name}: the reading is named"
        first = tokenizer.encode_prompt("a")[: tokenizer.adds_bos]
        assert [tokenizer.token_text(i) for i in first] == ([make.bos] if make.bos else []), name
        if make.bos_is_read_alike:
            starts = auto_ids(made(name), "zebra", ends=True) != auto_ids(made(name), "zebra")
            assert starts == tokenizer.adds_bos, name


@pytest.mark.parametrize("name", MAKES)
def test_every_command_reads_the_same_ids(made, name):
    directory = made(name)
    prepared = open_tokenizer(directory)
    texts = [text for text in [*PROBES, *named(prepared)] if text.strip()]
    wanted = [prepared.encode_prompt(text) for text in texts]
    options = EncodeOptions(
        "HuggingFaceTokenizer",
        str(directory),
        None,
        "text",
        "plain",
        None,
        "skip",
        False,
        0.0,
        False,
    )
    lines = b"\n".join(json.dumps({"text": text}).encode() for text in texts)
    encoder = Encoder(replace(options, append_eod=False))
    tokens = np.split(*_documents(encoder.encode(Block("x.jsonl", 1, lines))))
    kept = [ids for ids in wanted if len(ids) > 1]
    assert [ids.tolist() for ids in tokens] == kept
    run = open_of_run(
        Settings(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))
    )
    exported = open_exported(directory)
    evaluated = (
        encode_documents([Document({"text": text}, "text") for text in texts], exported)
        if (exported.bos_id is not None or exported.eos_id is not None)
        else []
    )
    assert [document.ids[1:] for document in evaluated] == [
        ids[prepared.adds_bos :] for ids in wanted
    ]
    writer = TextGenerator(_network(), exported)
    harness = for_transformers(exported)
    for reader in (run.encode_prompt, writer.encode, lambda text: harness(text).input_ids):
        assert [reader(text) for text in texts] == wanted


def _documents(encoded):
    train = encoded.train
    return train.tokens, np.cumsum(train.lengths)[:-1]


def _network():
    """Return the part of a network that a writer reads before it writes."""
    return SimpleNamespace(
        vocab_size=1024,
        model=SimpleNamespace(generation_config=None, config=SimpleNamespace(vocab_size=1024)),
    )


@pytest.mark.parametrize(
    "shift", [0, *(pytest.param(shift, marks=pytest.mark.long) for shift in (1, 2, 3))]
)
def test_autotokenizer_reads_every_export_as_we_do(tmp_path, shift):
    for number, name in enumerate(MAKES):
        for family in (FAMILIES[(number + shift) % 4],):
            directory = make_directory(name, tmp_path / f"{name}-{family}")
            (directory / "config.json").write_text(json.dumps({"model_type": family}))
            before = open_tokenizer(directory)
            write_for_transformers(directory)
            after = open_tokenizer(directory)
            texts = [*PROBES, *named(before)]
            assert (
                before.encode_batch(texts)
                == after.encode_batch(texts)
                == auto_ids(directory, texts)
            ), (name, family)
            assert (
                before.encode_prompt("zebra")
                == after.encode_prompt("zebra")
                == auto_ids(directory, "zebra", True)
            )
            read = AutoTokenizer.from_pretrained(directory)
            for word, token in before.special_tokens.items():
                assert getattr(read, word) == token == after.special_tokens[word], (name, family)
            assert (after.adds_bos, after.adds_eos, after.eos_id) == (
                before.adds_bos,
                before.adds_eos,
                before.eos_id,
            )
            assert (
                before.hashes <= after.hashes
                and not after.notes
                and after.chat_templates == before.chat_templates
            )


def test_templates_of_a_sentencepiece_directory_hold_control_tokens(made):
    """The ids are those of AutoTokenizer, which for LlamaTokenizer reads rendered texts equally."""
    directory = made("pieces_chat")
    tokenizer = open_tokenizer(directory)
    chat = [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "hello</s>"}]
    read = AutoTokenizer.from_pretrained(directory)
    for template in (
        "{{ bos_token }}[A] {{ messages[0].content }} [B]{{ eos_token }}" + CHATML,
        CHATML,
    ):
        text = read.apply_chat_template(chat, chat_template=template, tokenize=False)
        assert tokenizer.encode_rendered(text) == read(text, add_special_tokens=False).input_ids
    assert (
        set(tokenizer.chat_templates) == {"default", "other"}
        and tokenizer.chat_templates["default"] == CHATML
    )


def test_templates_in_files_of_their_own(made):
    directories = open_tokenizer(made("byte_level_added")).chat_templates
    assert directories == {"default": CHATML, "tool_use": "tools: " + CHATML}
    read = AutoTokenizer.from_pretrained(made("byte_level_added")).chat_template
    assert read == directories


def test_sentencepiece_itself_is_the_reading_of_a_bare_file(made):
    pieces = SentencePieceProcessor(model_file=str(made("pieces_bpe") / "tokenizer.model"))
    for place in (made("pieces_bpe"), made("pieces_bpe") / "tokenizer.model"):
        tokenizer = open_tokenizer(place)
        assert tokenizer.encode_batch(list(PROBES)) == pieces.encode(list(PROBES))
        assert [tokenizer.decode(pieces.encode(text)) for text in PROBES] == [
            pieces.decode(pieces.encode(text)) for text in PROBES
        ]


def test_the_class_that_rebuilds_a_file_is_named(made):
    for name in ("llama", "llama_without_prefix"):
        [line] = open_tokenizer(made(name)).notes
        assert line.startswith(
            f"{name}: tokenizer.json is read as it is; AutoTokenizer of transformers 5 rebuilds "
            "it as Llama"
        )
    [line] = open_tokenizer(made("bos_by_config")).notes
    assert line == (
        "bos_by_config: texts begin with bos ('<|begin|>'), as add_bos_token says; transformers 5 "
        "adds none"
    )


def test_a_dropped_merge_never_comes_back(made):
    tokenizer = open_tokenizer(made("dropout"))
    plain = open_tokenizer(made("byte_level"))
    for _ in range(3):
        assert tokenizer.encode_batch(list(PROBES)) == plain.encode_batch(list(PROBES))


def test_two_files_that_differ_are_named(made, tmp_path):
    directory = make_directory("pieces_bpe", tmp_path / "m")
    (directory / "tokenizer.json").write_bytes((made("byte_level") / "tokenizer.json").read_bytes())
    [line] = open_tokenizer(directory).notes
    assert line == "m: tokenizer.json is read; tokenizer.model beside it splits 'a' differently"
    assert (
        open_tokenizer(made("both")).hashes
        >= open_tokenizer(made("both") / "tokenizer.model").hashes
    )
