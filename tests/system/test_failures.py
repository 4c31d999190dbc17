"""A run that cannot go on ends on all ranks, soon, and says why where the user looks."""

import re
import shutil
import time

import numpy as np

from megatron_sorted.data.corpus import Corpus
from megatron_sorted.data.dataset import open_samples
from tests.system.conftest import run_script

BORDER = "=" * 60


def last_block(text: str) -> str:
    """Returns what stands between the last two borders that torchrun prints."""
    return text.split(BORDER)[-2]


def test_a_mistake_is_one_line_without_a_traceback(prepared):
    started = time.monotonic()
    done = run_script(prepared, "pretrain_sorted.py", "--config", "run.yaml", "--exit-layer-nums", 9)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --exit-layer-nums: 9 is not a layer of this model (--num-layers 4). Use 1..4.\n"
    assert time.monotonic() - started < 5  # torch alone takes longer to import on a busy machine


def test_a_mistake_under_torchrun_is_the_last_thing_seen(prepared):
    done = run_script(prepared, "pretrain_sorted.py", "--config", "run.yaml", "--train-iter", 9, processes=2)
    message = "error: --train-iter: there is no such flag. Did you mean --train-iters?"
    assert done.returncode != 0
    assert done.stderr.splitlines().count(message) == 1  # by one rank, as soon as it is found
    assert last_block(done.stderr).splitlines()[-1] == f"  traceback : {message}"
    assert "File \"" not in last_block(done.stderr) and "pretrain_sorted.py\", line" not in done.stderr


def test_an_error_of_one_rank_ends_all_and_is_seen_last(prepared, tmp_path):
    """Two data parallel ranks; the second meets a spoilt document in step 2, while the first waits for its gradients."""
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
    done = run_script(tmp_path, "pretrain_sorted.py", "--config", "run.yaml", "--pipeline-model-parallel-size", 1, "--train-iters", 50,
                      "--eval-interval", "none", processes=2, seconds=120)
    seconds = time.monotonic() - started
    message = f"error: data/train_text_document: document {document}: token 60000 is outside the model's vocabulary of 300."
    assert done.returncode != 0 and seconds < 60
    assert "step  1/50" in done.stdout and "step 50/50" not in done.stdout
    block = last_block(done.stderr)
    assert re.search(r"Root Cause.*rank      : 1 .*traceback : " + re.escape(message), block, re.DOTALL), done.stderr
    # the rank that waited for gradients is not mistaken for the cause, and nobody has to read a traceback
    assert block.count("error: ") == 1 and "Traceback" not in block and "Connection" not in done.stderr
