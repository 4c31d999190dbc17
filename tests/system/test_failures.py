"""A run that fails ends on all ranks, soon, and reports why where the user looks."""

import re
import shutil
import time

import numpy as np
import pytest
import torch.distributed as dist

from megatron_sorted.commands.train import main
from megatron_sorted.data.samples.corpus import Corpus
from megatron_sorted.data.samples.dataset import open_samples
from megatron_sorted.errors import SettingsError
from tests.support.commands import run_command

BORDER = "=" * 60


def last_block(text: str) -> str:
    """Return the text between the last two borders that torchrun prints."""
    return text.split(BORDER)[-2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--exit-layer-nums 0",
            "--exit-layer-nums: 0 is not a layer of this model (--num-layers 4). Use 1..4.",
        ),
        ("--exit-layer-nums 2 2", "--exit-layer-nums: 2 is listed more than once"),
        ("--exit-layer-weight 0.1 0.2", "--exit-layer-weight: 2 values for 4 exits"),
        ("--num-layers 5", "--num-layers: 5 "),  # on 2 stages
        ("--tensor-model-parallel-size 3", "--num-attention-heads: 4 is not a multiple of 3"),
        (
            "--pipeline-model-parallel-size 4",
            "number of processes: 2 is not a multiple of 4 (tensor x pipeline x context parallel "
            "size). ",
        ),
        ("--global-batch-size 3", "--global-batch-size: 3 is not a multiple of 2"),
        (
            "--exit-layer-num 2",
            "--exit-layer-num: there is no such flag. Did you mean --exit-layer-nums?",
        ),
        ("--lr fast", "--lr: 'fast' is not a value of this setting. Give a number."),
        (
            "--config wrong.yaml",
            "--config: given 2 times (run.yaml, wrong.yaml). Give one file; flags override it.",
        ),
        ("--bf16 --fp16", "--bf16, --fp16: a run has one precision. "),
        ("--mock-data", "--mock-data: random tokens together with real ones (--data-path). "),
        (
            "--finetune",
            "--finetune: no checkpoint to take weights from. Give --load or leave it out.",
        ),
    ],
)
def test_every_mistake_in_settings_is_reported_before_ranks_meet(
    prepared, monkeypatch, arguments, message
):
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SettingsError) as error:
        main(["--config", "run.yaml", *arguments.split()])
    assert str(error.value).startswith(message) and not dist.is_initialized()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "num-layers: four",
            "wrong.yaml, line 1, num-layers: 'four' is not a value of this setting. Give a whole "
            "number.",
        ),
        (
            "num-layers: 4\nexit-layers: [2]",
            "wrong.yaml, line 2, exit-layers: there is no such setting. Did you mean "
            "exit-layer-nums?",
        ),
        ("[1, 2]", "wrong.yaml: a run is a mapping, this file holds something else. "),
    ],
)
def test_every_mistake_in_a_file_names_its_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(SettingsError) as error:
        main(["--config", "wrong.yaml"])
    assert str(error.value).startswith(message)


def test_a_mistake_is_one_line_without_a_traceback(prepared):
    started = time.monotonic()
    done = run_command(
        "pretrain_sorted.py", "--config", "run.yaml", "--exit-layer-nums", 9, cwd=prepared
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "error: --exit-layer-nums: 9 is not a layer of this model (--num-layers 4). Use 1..4.\n"
    )
    assert time.monotonic() - started < 5  # torch alone takes longer to import on a busy machine


def test_a_mistake_under_torchrun_is_the_last_thing_seen(prepared):
    done = run_command(
        "pretrain_sorted.py", "--config", "run.yaml", "--train-iter", 9, processes=2, cwd=prepared
    )
    message = "error: --train-iter: there is no such flag. Did you mean --train-iters?"
    assert done.returncode != 0
    assert done.stderr.splitlines().count(message) == 1  # by one rank, as soon as it is found
    assert last_block(done.stderr).splitlines()[-1] == f"  traceback : {message}"
    assert (
        'File "' not in last_block(done.stderr) and 'pretrain_sorted.py", line' not in done.stderr
    )


def test_an_error_of_one_rank_ends_all_and_is_seen_last(prepared, tmp_path):
    """Of two data parallel ranks the second reads a damaged document while the first waits."""
    shutil.copytree(prepared / "data", tmp_path / "data")
    shutil.copy(prepared / "run.yaml", tmp_path)
    prefix = str(tmp_path / "data" / "train_text_document")
    corpus = Corpus([prefix])
    source = open_samples(corpus, 64, 300, 0, 1234)
    # sample 6 is the first rank 1 reads of its second step: ranks take micro-batches of 2 in turn
    documents, starts = source._epoch(0)
    document = int(source._numbers[documents[starts[6]]])
    tokens = np.memmap(f"{prefix}.bin", np.uint16, "r+")
    tokens[corpus.lengths[: document + 1].sum() - 1] = 60000
    tokens.flush()
    started = time.monotonic()
    done = run_command(
        "pretrain_sorted.py",
        "--config",
        "run.yaml",
        "--pipeline-model-parallel-size",
        1,
        "--train-iters",
        50,
        "--eval-interval",
        "none",
        processes=2,
        seconds=120,
        cwd=tmp_path,
    )
    seconds = time.monotonic() - started
    message = (
        f"error: data/train_text_document: document {document}: token 60000 is outside the model's "
        "vocabulary of 300."
    )
    assert done.returncode != 0 and seconds < 100
    assert "step  1/50" in done.stdout and "step 50/50" not in done.stdout
    block = last_block(done.stderr)
    assert re.search(
        r"Root Cause.*rank      : 1 .*traceback : " + re.escape(message), block, re.DOTALL
    ), done.stderr
    # the rank that waited for gradients is not mistaken for the cause, and there is no traceback
    assert (
        block.count("error: ") == 1 and "Traceback" not in block and "Connection" not in done.stderr
    )
