"""Mistakes about files are reported before any process group starts, with file and remedy."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sorted.checkpoint.layout import TRACKER
from megatron_sorted.checkpoint.manifest import MANIFEST, Progress, manifest_text, record_file
from megatron_sorted.data.identity import data_identity
from megatron_sorted.data.preparation.encode import EncodeOptions
from megatron_sorted.data.preparation.prepare import PrepareOptions, prepare
from megatron_sorted.errors import CheckpointError, DataError, SettingsError
from megatron_sorted.parallel.groups import Place
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.describe import description
from megatron_sorted.training.run.inputs import find_checkpoints, open_inputs
from megatron_sorted.training.run.start import prepare as prepare_run


def prepare_data(folder: Path) -> None:
    """Write prepared data and its tokenizer, and another tokenizer."""
    options = EncodeOptions(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=None,
        vocab_size=None,
        data_format="auto",
        prompt_template="plain",
        seq_length=64,
        too_long="truncate",
        append_eod=True,
        valid_fraction=0.0,
        strict=False,
    )
    for name, word in (("mine", "Count"), ("other", "Sum")):
        lines = [
            json.dumps(
                {
                    "instruction": f"{word} all the numbers up to {i}, please",
                    "output": "Here they are: " + " ".join(map(str, range(i % 9 + 1))),
                }
            )
            for i in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        prepare(
            PrepareOptions(
                (str(folder / f"{name}.jsonl"),), str(folder / name), options, train_tokenizer=290
            )
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Return a folder with prepared data, which tests copy, since to train tokenizers is slow."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_data(folder)
    return folder


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    """Return a folder with prepared data and its tokenizer, and another tokenizer."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def settings(folder: Path, **changes) -> Settings:
    data = {
        "data_path": (str(folder / "mine_text_document"),),
        "tokenizer_model": str(folder / "mine_tokenizer.model"),
        "split": "90,10",
    }
    base = Settings(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=64,
        device="cpu",
        exit_layer_nums=(2,),
    )
    return dataclasses.replace(base, **{**data, **changes})


def refused(kind: type, run: Settings) -> str:
    """Return the message with which a run is refused, without its folder."""
    with pytest.raises(kind) as error:
        prepare_run(run)
    assert not dist.is_initialized()
    return str(error.value).replace(f"{Path(run.data_path[0]).parent}/", "")


def write_checkpoint(root: Path, run: Settings, step: int = 7) -> Path:
    """Write a checkpoint of ``run`` without weights: all that is read before ranks meet."""
    directory = root / f"iter_{step:07d}"
    directory.mkdir(parents=True)
    (directory / ".metadata").write_text("{}")
    place = Place(
        rank=0, world_size=1, stage=0, num_stages=1, data_rank=0, data_size=1, tensor_rank=0
    )
    described = description(
        dataclasses.replace(run, vocab_size=290), 290, "ab12", place, None, data_identity(run)
    )
    (directory / MANIFEST).write_text(
        manifest_text(
            described, Progress(step, 9), {".metadata": record_file(directory / ".metadata")}
        )
    )
    (root / TRACKER).write_text(f"{step}\n")
    return directory


def taken_by(run: Settings) -> Path | None:
    """Return the checkpoint a run would take, before hashes are compared."""
    checkpoints = open_inputs(run).checkpoints
    return None if checkpoints is None else checkpoints.usable[0].directory


def test_a_run_without_mistakes_is_opened(folder):
    run = settings(
        folder,
        save=str(folder / "new" / "save"),
        metrics_file=str(folder / "elsewhere" / "m.jsonl"),
    )
    inputs = open_inputs(run)
    assert inputs.vocab_size == inputs.settings.vocab_size == 290 and inputs.checkpoints is None
    assert inputs.samples.describe().startswith("36 documents in ") and list(inputs.eval_sets) == [
        "mine"
    ]
    assert list((folder / "new" / "save").iterdir()) == [] == list((folder / "elsewhere").iterdir())


def test_missing_and_truncated_data_names_file_and_bytes(folder):
    absent = settings(folder, data_path=(str(folder / "absent"),))
    assert refused(DataError, absent).startswith(
        "absent.idx: no such file; indexed data needs PREFIX.bin and PREFIX.idx. "
    )
    path = folder / "mine_text_document.bin"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    assert refused(DataError, settings(folder)) == (
        f"mine_text_document.bin: {whole - 2} bytes, but mine_text_document.idx lists {whole // 2} "
        f"tokens of 2 bytes = {whole} bytes; "
        "the file is truncated, or the two are not of one run. Write it again with megatron-sorted "
        "prepare."
    )
    index = folder / "mine_text_document.idx"
    index.write_bytes(index.read_bytes()[:20])
    assert refused(DataError, settings(folder)).startswith(
        "mine_text_document.idx: 20 bytes, but the header alone takes 34"
    )


def test_samples_longer_than_the_sequence(folder):
    message = refused(DataError, settings(folder, seq_length=16))
    assert re.match(
        r"mine_text_document: document \d+ has \d+ tokens, but --seq-length 16 holds at most 17 "
        r"\(\d+ such",
        message,
    )


def test_vocabulary_and_tokenizer(folder):
    name = str(folder / "mine_tokenizer.model")
    assert refused(DataError, settings(folder, vocab_size=289)) == (
        "--tokenizer-model: the model has a vocabulary of 289, but texts of tokenizer "
        "mine_tokenizer.model have ids up to 289, so the two "
        "do not belong together. Give the model's own tokenizer, or for a new model a --vocab-size "
        "of at least 290."
    )
    assert refused(DataError, settings(folder, tokenizer_model=name + "x")) == (
        "--tokenizer-model: mine_tokenizer.modelx: no tokenizer (tokenizer.json, tokenizer.model, "
        "or vocab.json with merges.txt). Give a "
        "directory or a sentencepiece file that exists."
    )


def test_data_of_another_tokenizer(folder):
    mine, other = (
        hashlib.sha256((folder / f"{name}_tokenizer.model").read_bytes()).hexdigest()[:16]
        for name in ("mine", "other")
    )
    run = settings(folder, tokenizer_model=str(folder / "other_tokenizer.model"))
    assert refused(DataError, run) == (
        f"mine_text_document: prepared with tokenizer mine_tokenizer.model (sha256 {mine}), but "
        f"--tokenizer-model is other_tokenizer.model "
        f"(sha256 {other}). Give the tokenizer the data was prepared with, or prepare it again."
    )
    # evaluation sets too, also the one that --valid-fraction writes
    for ending in ("bin", "idx"):
        (folder / f"other_text_document.{ending}").rename(
            folder / f"other_valid_text_document.{ending}"
        )
    run = settings(folder, valid_data_path=(str(folder / "other_valid_text_document"),))
    assert refused(DataError, run).startswith(
        "other_valid_text_document: prepared with tokenizer other_tokenizer.model"
    )
    (folder / "other.json").write_text("[]")
    assert refused(DataError, run).startswith(
        "other.json: not a JSON object. Prepare the data again"
    )
    (folder / "other.json").unlink()
    assert list(open_inputs(run).eval_sets) == ["other_valid"]


def test_a_directory_that_cannot_be_written(folder):
    (folder / "file").write_text("")
    inside = str(folder / "file" / "inside")
    for flag, field in (("--save", "save"), ("--metrics-file", "metrics_file")):
        message = refused(SettingsError, settings(folder, **{field: inside}))
        assert re.fullmatch(
            flag + r": cannot write in \S+ \(.+\)\. Give a directory that can be written\.", message
        )


@pytest.mark.parametrize("closed", ["save", "."])
def test_directories_without_permission(folder, closed):
    """The directory or its parent may not be read, even if root runs the tests."""
    write_checkpoint(folder / "save", settings(folder))
    run = settings(folder, load=str(folder / "save"), vocab_size=290)
    (folder / closed).chmod(0)
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.seteuid(65534)
            find_checkpoints(run, None, None)
        except CheckpointError as error:
            message = (
                f"--load: cannot read {folder / 'save'} (Permission denied). "
                "Give a directory that can be read."
            )
            os._exit(0 if str(error) == message else 2)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    (folder / closed).chmod(0o700)
    assert os.waitstatus_to_exitcode(status) == 0


def test_load_from_a_directory_that_is_not_there(folder):
    missing, empty = str(folder / "missing"), folder / "empty"
    empty.mkdir()
    for more in ({}, {"save": str(folder / "save")}, {"finetune": True}):
        assert refused(CheckpointError, settings(folder, load=missing, **more)) == (
            "--load: missing is not a directory. Give the directory that --save of another run "
            "wrote to."
        )
    # a job that saves where it loads starts afresh the first time
    assert taken_by(settings(folder, load=missing, save=missing)) is None
    assert taken_by(settings(folder, load=str(empty))) is None
    for strict in ("finetune", "skip_train", "exit_on_missing_checkpoint"):
        assert refused(
            CheckpointError, settings(folder, load=str(empty), **{strict: True})
        ).startswith("--load: empty holds no checkpoint. ")


def test_incomplete_checkpoints(folder):
    root = folder / "save"
    directory, run = write_checkpoint(root, settings(folder)), settings(folder, load=str(root))
    (root / TRACKER).write_text("latest")
    assert taken_by(run) == directory
    (root / TRACKER).write_text("8")
    assert taken_by(run) == directory
    (directory / ".metadata").unlink()
    assert refused(CheckpointError, run) == (
        "--load: save holds no complete checkpoint: save/iter_0000008: missing, although "
        "latest_checkpointed_iteration.txt names it. "
        "save/iter_0000007/.metadata: No such file or directory. Restore one, or give another "
        "directory."
    )
    assert refused(CheckpointError, dataclasses.replace(run, ckpt_step=8)).startswith(
        "--ckpt-step: save holds no checkpoint of step 8; "
    )


def test_pretrained_weights_start_a_run_and_its_own_checkpoints_resume_it(folder):
    pretrained, own = write_checkpoint(folder / "pretrained", settings(folder)), folder / "own"
    run = settings(
        folder, pretrained_checkpoint=str(folder / "pretrained"), load=str(own), save=str(own)
    )
    inputs = open_inputs(run)
    assert inputs.settings.finetune and inputs.checkpoints.usable[0].directory == pretrained
    mine = write_checkpoint(own, settings(folder), step=3)
    inputs = open_inputs(run)
    assert not inputs.settings.finetune and inputs.checkpoints.usable[0].directory == mine
    missing = dataclasses.replace(run, load=None, pretrained_checkpoint=str(folder / "nowhere"))
    assert refused(CheckpointError, missing) == (
        "--pretrained-checkpoint: nowhere is not a directory. Give the directory that --save of "
        "another run wrote to."
    )


@pytest.mark.parametrize(
    ("changes", "flag", "saved", "now"),
    [
        ({"optimizer": "sgd"}, "--optimizer", "adam", "sgd"),
        ({"bf16": True}, "--bf16", "False", "True"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer", "False", "True"),
    ],
)
def test_state_of_another_form_is_refused_unless_left_behind(folder, changes, flag, saved, now):
    directory, run = (
        write_checkpoint(folder / "save", settings(folder)),
        settings(folder, load=str(folder / "save"), **changes),
    )
    assert refused(CheckpointError, run) == (
        f"{flag}: {saved} in save/iter_0000007, {now} in this run; the optimizer's state is kept "
        f"in a form that depends on it. Keep it, or "
        "continue without that state (--no-load-optim)."
    )
    for flag_out in ("no_load_optim", "finetune"):
        assert taken_by(dataclasses.replace(run, **{flag_out: True})) == directory


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"hidden_size": 64},
            "--hidden-size: 32 in the checkpoint, 64 in this run; --ffn-hidden-size: 128 in the "
            "checkpoint, 192 in this run; "
            "--kv-channels: 8 in the checkpoint, 16 in this run",
        ),
        ({"num_layers": 6}, "--num-layers: 4 in the checkpoint, 6 in this run"),
        ({"vocab_size": 300}, "--vocab-size: 290 in the checkpoint, 300 in this run"),
        (
            {"use_exit_norm": True, "exit_layer_nums": (2, 3)},
            "--use-exit-norm: False in the checkpoint, True in this run; --exit-layer-nums: [2, 4] "
            "in the checkpoint, [2, 3, 4] in this run",
        ),
    ],
)
def test_a_checkpoint_of_other_sizes(folder, changes, difference):
    write_checkpoint(folder / "save", settings(folder))
    assert refused(CheckpointError, settings(folder, load=str(folder / "save"), **changes)) == (
        f"save/iter_0000007: made with other sizes. {difference}. Use the checkpoint's values, or "
        f"train anew without --load."
    )


def test_exits_that_share_norm_and_head_may_change(folder):
    directory = write_checkpoint(folder / "save", settings(folder))
    assert (
        taken_by(settings(folder, load=str(folder / "save"), exit_layer_nums=(1, 3))) == directory
    )
