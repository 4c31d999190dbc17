"""The kind of model that a directory holds, judged by file names."""

import pytest

from megatron_sorted.conversion.directory_kind import is_hugging_face, kind_of
from megatron_sorted.errors import CheckpointError


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["config.json"], "hugging_face"),
        (["config.json", "iter_0000010/manifest.json"], "hugging_face"),
        (["config.json", "manifest.json"], "checkpoint"),
        (["iter_0000010/manifest.json"], "checkpoints"),
        (["latest_checkpointed_iteration.txt"], "megatron"),
        (["metadata.json"], "megatron"),
        (["mp_rank_00/model_optim_rng.pt"], "megatron"),
    ],
)
def test_file_names_decide(tmp_path, files, kind):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert kind_of(tmp_path) == kind
    assert is_hugging_face(tmp_path) == (kind == "hugging_face")


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a Hugging Face model .* It holds nothing"):
        kind_of(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"neither .* It holds notes\.txt"):
        kind_of(tmp_path)
