"""Fast tokenizers from sentencepiece files: every option, real files, fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from megatron_sorted.conversion.tokenizers.check import TEXTS
from megatron_sorted.conversion.tokenizers.export import add_fast_tokenizer
from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece
from megatron_sorted.exported.tokenizer import open_tokenizer
from tests.support.sentencepiece_files import SETTINGS, check_tokenizer, lines, texts_not_built_in


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        *(("bpe", name) for name in SETTINGS),
        *(("unigram", name) for name in SETTINGS if name != "nfkc_blanks_kept"),
        ("char", "symbols"),
    ],
)
def test_ids_and_texts_are_sentencepieces(algorithm, name, tmp_path):
    check_tokenizer(algorithm, name, tmp_path)


def test_real_tokenizers(tmp_path):
    root = os.environ.get("MEGATRON_SORTED_TOKENIZERS")
    if root is None:
        pytest.skip(
            "MEGATRON_SORTED_TOKENIZERS names no folder with tokenizer.model files of real models "
            "in it"
        )
    paths = sorted(Path(root).rglob("tokenizer.model"))
    assert paths
    for number, path in enumerate(paths):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "tokenizer.model").write_bytes(path.read_bytes())
        assert "the same ids" in add_fast_tokenizer(directory)
        pieces, texts = (
            SentencePieceProcessor(model_file=str(path)),
            [*TEXTS, *texts_not_built_in()],
        )
        assert open_tokenizer(directory).encode_batch(texts) == pieces.encode(texts)


def test_a_fresh_process_gets_the_right_ids(tmp_path):
    train_sentencepiece(lines, str(tmp_path / "tokenizer.model"), 700)
    lines_printed = {}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        (tmp_path / family).mkdir()
        (tmp_path / family / "config.json").write_text(
            json.dumps({"model_type": family, "max_position_embeddings": 77})
        )
        (tmp_path / family / "tokenizer.model").write_bytes(
            (tmp_path / "tokenizer.model").read_bytes()
        )
        lines_printed[family] = add_fast_tokenizer(tmp_path / family)
    code = (
        "import json, sys; from transformers import AutoTokenizer\n"
        "texts = json.load(sys.stdin)\n"
        "for family in ('llama', 'mistral', 'qwen2', 'qwen3'):\n"
        "    tokenizer = AutoTokenizer.from_pretrained(family)\n"
        "    print(json.dumps([family, tokenizer.model_max_length, tokenizer(texts).input_ids]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    right = [[1, *ids] for ids in pieces.encode(list(TEXTS))]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [family, 77, right] for family in lines_printed
    ]
    for family in lines_printed:
        assert [open_tokenizer(tmp_path / family).encode_prompt(text) for text in TEXTS] == right
