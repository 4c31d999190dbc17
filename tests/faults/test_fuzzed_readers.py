"""Damaged files and requests: a reader returns a value or reports one line.

It does so soon and in little memory.
"""

import gzip
import json
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_sorted.benchmark.questions import read_questions as read_conversations
from megatron_sorted.checkpoint.candidates import find_candidates, tracked_step
from megatron_sorted.checkpoint.layout import TRACKER
from megatron_sorted.checkpoint.manifest import (
    MANIFEST,
    Progress,
    _own_hash,
    manifest_text,
    read_manifest,
)
from megatron_sorted.data.indexed import Documents, IndexedWriter, open_indexed
from megatron_sorted.data.preparation.encode import EncodeOptions, Encoder
from megatron_sorted.data.preparation.split import read_samples
from megatron_sorted.data.prepared import check_same_tokenizer, read_prompt_form
from megatron_sorted.errors import SortedError
from megatron_sorted.evaluation.documents import read_documents
from megatron_sorted.evaluation.questions import read_questions
from megatron_sorted.reading.json_lines import read_blocks
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.text_file import read_text, split_lines
from megatron_sorted.reporting.exits import read_evaluation
from megatron_sorted.reporting.run_reports import read_run
from megatron_sorted.serving.body import parse_body
from megatron_sorted.serving.prompts import read_prompts
from megatron_sorted.serving.requests import (
    ChatRequest,
    CompletionRequest,
    read_request,
    read_stop_sequences,
)
from megatron_sorted.serving.turns import read_messages
from megatron_sorted.settings.load import load_settings
from megatron_sorted.text.chat_template import ChatTemplate, TemplateRefusal
from megatron_sorted.text.prompt_form import ControlToken, PromptForm, form_from_bytes
from megatron_sorted.text.tokenizer.contract import NullTokenizer
from megatron_sorted.text.tokenizer.opening import open_tokenizer
from tests.rules.sources import ROOT
from tests.support.fuzzing import check_reader, fuzzed, written
from tests.support.tokenizer_directories import CHATML, make_directory

TALK = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho", "tool_calls": None},
]
CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
FORM = PromptForm(
    "chat", CHATML, {"bos_token": "<s>"}, ControlToken("<s>", 1), (ControlToken("</s>", 2),)
)


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@fuzzed
def test_json_files(examples, tmp_path):
    path = tmp_path / "x.json"
    valid = [
        json.dumps({"a": 1, "b": [1.5, None, {"c": "größer"}], "d": True}).encode(),
        b'\xef\xbb\xbf{"a": {}}',
    ]
    check_reader(
        valid,
        lambda data: read_json_object(written(path, data), unique_names=len(data) % 2 == 0),
        examples,
    )


RECORDS = lines(
    {"text": "a\u2028b"},
    {"instruction": "Q", "input": None, "output": "A"},
    {"messages": TALK, "tools": "[]"},
    {"messages": [TALK[1], CALL, {"role": "tool", "content": "2"}, TALK[2]], "text": None},
)
ROWS = [
    RECORDS,
    json.dumps([json.loads(row) for row in RECORDS.strip().split(b"\n")], indent=1).encode(),
    gzip.compress(RECORDS[:80]),
]


@fuzzed
def test_records_of_training_and_evaluation(examples, tmp_path):
    path = tmp_path / "x.jsonl"
    options = EncodeOptions(
        "NullTokenizer", None, 4, "messages", "plain", 16, "truncate", False, 0.5, False
    )

    class Letters(NullTokenizer):
        def encode_batch(self, texts):
            return [[min(ord(letter), 99) for letter in text] for text in texts]

    encoder = Encoder(options, Letters(100))

    def read(data: bytes) -> None:
        written(path, data)
        for block in read_blocks([str(path)], limit=None if len(data) % 2 else 3):
            encoder.encode(block)
        read_samples(path, None)
        read_documents(path)

    check_reader(ROWS[:2], read, examples)
    check_reader(
        ROWS[2:], lambda data: list(read_blocks([str(written(path, data))])), min(examples, 500)
    )


@fuzzed
def test_questions(examples, tmp_path):
    path = tmp_path / "x.jsonl"
    closed_book = lines(
        {
            "question": "Q?",
            "answer": {"value": "A", "aliases": ["B", None], "human_answers": None},
            "aliases": None,
        },
        {"question": None, "context": "Question: C?\nAnswer:", "answer": ["x", "y"]},
        {"instruction": "I", "output": "O"},
    )
    check_reader([closed_book], lambda data: read_questions(written(path, data)), examples // 2)
    spec_bench = lines(
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": "b", "category": "own", "turns": ["a"]},
    )
    check_reader([spec_bench], lambda data: read_conversations(written(path, data)), examples // 2)


@fuzzed
def test_reports_of_runs(examples, tmp_path):
    path = tmp_path / "metrics.jsonl"
    exits = {"2": {"loss": 1.5, "perplexity": 4.5}, "4": {"loss": 1, "perplexity": None}}
    reports = lines(
        {"kind": "train", "time": 1.0, "step": 1, "exits": exits},
        {"kind": "evaluation", "step": 1, "name": "valid", "exits": exits},
        {"kind": "train", "step": 2, "exits": exits},
    )

    def read(data: bytes) -> None:
        run = read_run(written(path, data))
        for name in (None, *run.evaluations):
            run.final(name)
        for depth in run.depths:
            run.exit_curve(depth, "loss", None)

    check_reader([reports, reports[:-9]], read, examples // 2)
    scores = {"2": {"loss": 1.0, "exact_match": 0.5}}
    cost = {"2": {"parameters": 5, "flops_per_token": 1e9}}
    evaluation = json.dumps(
        {"run": "a", "exits": cost, "sets": {"v_text_document": scores}}
    ).encode()
    check_reader(
        [evaluation],
        lambda data: read_evaluation(written(tmp_path / "evaluation.json", data)),
        examples // 2,
    )


@fuzzed
def test_texts(examples, tmp_path):
    text = "One\r\ntwo\u2028\x0bthree\n\nfour größer".encode()
    check_reader(
        [text, gzip.compress(text)],
        lambda data: split_lines(read_text(written(tmp_path / "t", data))),
        examples,
    )


@fuzzed
def test_settings(examples, tmp_path):
    valid = [
        (ROOT / "examples" / f"{name}.yaml").read_bytes()[-900:].partition(b"\n")[2]
        for name in ("demo_nested", "quickstart")
    ]
    more = (
        b"lr: 1e-4\nexit-layer-nums: [2, 4]\nbf16: true\n"
        b"wandb-exp-name: &a 2025-13-01\nsave: *a\nseed: 0o17\n"
    )
    check_reader(
        [*valid, more],
        lambda data: load_settings(["--config", str(written(tmp_path / "run.yaml", data))]),
        examples,
    )


@pytest.mark.parametrize(
    ("make", "name", "share"),
    [
        ("byte_level", "tokenizer.json", 1),
        ("byte_level", "tokenizer_config.json", 1),
        ("byte_level", "special_tokens_map.json", 4),
        ("byte_level", "added_tokens.json", 4),
        ("pieces_bpe", "tokenizer.model", 1),
    ],
)
@fuzzed
def test_files_of_tokenizers(examples, make, name, share, tmp_path):
    directory = make_directory(make, tmp_path / "m")
    path = directory / name
    if not path.exists():
        named = {"eos_token": "<|end|>", "bos_token": {"content": "<b>"}}
        path.write_text(json.dumps({"<new>": 400} if name == "added_tokens.json" else named))

    def read(data: bytes) -> None:
        tokenizer = open_tokenizer(written(path, data).parent)
        tokenizer.decode(tokenizer.encode("the dog 12 größer\n"))

    check_reader([path.read_bytes()], read, examples // share)


@fuzzed
def test_chat_templates(examples):
    def read(data: bytes) -> None:
        template = ChatTemplate(data.decode("utf-8", errors="replace"), "chat template")
        template.render([*TALK, CALL], {"bos_token": "<s>", "eos_token": "</s>"}, True)

    tagged = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m.content is string %}{{ m.content | trim }}"
        "{% else %}{{ m.tool_calls | tojson }}{% endif %}",
    )
    ranges = (
        "{% set ns = namespace(n=0) %}{% for x in range(3) %}"
        "{% set ns.n = ns.n + x * 2 ** 3 %}{% endfor %}{{ ns.n ~ 'a' * 5 }}"
    )
    check_reader(
        [text.encode() for text in (CHATML, tagged, ranges)],
        read,
        examples,
        (SortedError, TemplateRefusal),
    )


@fuzzed
def test_indexed_data(examples, tmp_path):
    prefix = str(tmp_path / "x")
    valid = []
    for with_modes in (False, True):
        with IndexedWriter(prefix, np.uint16, with_modes) as writer:
            modes, sizes = (
                (np.array([0, 1] * 3), np.full(3, 2))
                if with_modes
                else (np.zeros(0), np.ones(6, np.int64))
            )
            writer.append(Documents(np.arange(12), np.full(6, 2), modes, sizes))
        valid.append(Path(f"{prefix}.idx").read_bytes())
    header = struct.unpack_from("<QBQQ", valid[0], 9)
    assert header == (1, 8, 6, 7)

    def read(data: bytes) -> None:
        written(tmp_path / "x.idx", data)
        opened = open_indexed(prefix)
        for number in range(opened.num_documents):
            assert (
                len(opened.document(number))
                == len(opened.trained(number))
                == opened.document_lengths()[number]
            )

    check_reader(valid, read, examples)


@fuzzed
def test_trackers(examples, tmp_path):
    check_reader(
        [b"100\n", b"0000007"],
        lambda data: tracked_step(written(tmp_path / TRACKER, data).parent),
        examples,
    )


@pytest.mark.parametrize("signs", [False, True], ids=["as it is", "signed again"])
@fuzzed
def test_manifests(examples, signs, tmp_path):
    directory = tmp_path / "iter_0000004"
    directory.mkdir()
    stated = {
        "run_id": "a",
        "saved_at": "2026",
        "settings": {"num_layers": 4},
        "shape": {},
        "layout": {},
        "tokenizer": None,
        "samples_a_step": 8,
    }
    valid = manifest_text(stated, Progress(4, 32), {}).encode()

    def read(data: bytes) -> None:
        if signs:  # so that its hash is right, whatever it holds
            try:
                manifest = json.loads(data)
                data = json.dumps({**manifest, "sha256": _own_hash(manifest)}).encode()
            except (ValueError, TypeError, RecursionError, UnicodeEncodeError):
                return
        written(directory / MANIFEST, data)
        find_candidates(tmp_path)
        read_manifest(directory)

    check_reader([valid], read, examples)


@fuzzed
def test_requests(examples):
    def read(kind, data: bytes) -> None:
        request = read_request(kind, parse_body(data, "application/json"))
        read_stop_sequences(request.stop)
        if kind is ChatRequest:
            read_messages(request.messages, 64)
        else:
            read_prompts(request.prompt, 8, 64, 100)

    chat = {
        "model": "m",
        "messages": [*TALK, CALL, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["a"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
    }
    called = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": '{"x": [1]}'}}],
    }
    valid = [
        json.dumps(chat).encode(),
        json.dumps({"messages": [called], "seed": 5, "n": 2, "user": None}).encode(),
    ]
    check_reader(valid, partial(read, ChatRequest), examples)
    prompts = [
        json.dumps({"prompt": prompt, "top_p": 0.5, "logprobs": 1, "echo": False}).encode()
        for prompt in ("a", ["a", "b"], [1, 2], [[1], [2, 3]])
    ]
    check_reader(prompts, partial(read, CompletionRequest), examples)


@fuzzed
def test_summaries_and_prompt_forms(examples, tmp_path):
    tokenizer = NullTokenizer(10)
    stated = {
        "samples_read": 1,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "prompt_form": FORM.as_dict(),
    }

    def read(data: bytes) -> None:
        written(tmp_path / "x.json", data)
        check_same_tokenizer([str(tmp_path / "x_text_document")], tokenizer)
        read_prompt_form(str(tmp_path / "x_text_document"))

    check_reader([json.dumps(stated).encode()], read, examples // 2)
    check_reader(
        [FORM.as_json().encode()],
        lambda data: form_from_bytes(data, "prompt_form.json").render(TALK),
        examples // 2,
    )
