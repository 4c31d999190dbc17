"""What cannot work is refused before weights are loaded, with value, rule and remedy."""

import json

import pytest

from megatron_sorted.errors import PlatformError, SettingsError
from megatron_sorted.platform.supported import VLLM_TESTED
from megatron_sorted.serving.vllm.options import KEY, EngineOptions, engine_arguments
from tests.vllm.engine import ENGINE
from tests.vllm.models import write_model

SELF = EngineOptions("self_speculative", (2,))
SORTED = EngineOptions("sorted_speculative", (1, 2), (0.5, 0.5))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("refused") / "model")


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where weights would be loaded."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    def load(*_arguments, **_options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(CPUWorker, "load_model", load)


def start(arguments: dict) -> None:
    """Start an engine that must refuse."""
    from vllm import LLM

    LLM(**{**ENGINE, **arguments})


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (SELF, {"speculative_config": None}, "without the --speculative-config that it needs"),
        (
            SELF,
            {"speculative_config": {"use_local_argmax_reduction": True}},
            "--speculative-config: use_local_argmax_reduction would change",
        ),
        (SELF, {"enable_lora": True}, "--enable-lora: drafted tokens would take"),
        (SELF, {"additional_config": {}}, "--additional-config: megatron_sorted is None"),
        (
            SELF,
            {"additional_config": {KEY: {**SELF.to_json(), "depths": (4,)}}},
            "4 is no exit of .* below its last layer. Use 1, 2, 3",
        ),
        (
            SELF,
            {"hf_overrides": {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}},
            "layer_types of config.json: exits draft where all layers attend alike",
        ),
    ],
)
def test_settings_of_vllm_that_do_not_fit(model, no_weights, options, more, message):
    arguments = engine_arguments(model, options)
    if more.get("speculative_config"):
        more = {"speculative_config": arguments["speculative_config"] | more["speculative_config"]}
    with pytest.raises(SettingsError, match=message):
        start({**arguments, **more})


def test_what_does_not_start_in_this_process(model, monkeypatch):
    """By the configuration alone: pipeline stages, asynchronous scheduling, the other runner."""
    from vllm.engine.arg_utils import EngineArgs

    from megatron_sorted.serving.vllm.checks import check_config

    config = EngineArgs(**{**ENGINE, **engine_arguments(model, SELF)}).create_engine_config()
    check_config(config, SELF)
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(SettingsError, match="--pipeline-parallel-size 2: drafts need the first"):
        check_config(config, SELF)
    config.parallel_config.pipeline_parallel_size = 1
    config.scheduler_config.async_scheduling = True
    check_config(config, SELF)
    with pytest.raises(SettingsError, match="--async-scheduling: drafts of several lengths"):
        check_config(config, SORTED)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(SettingsError, match="VLLM_USE_V2_MODEL_RUNNER: the plug-in is not tested"):
        check_config(config, SELF)


@pytest.mark.parametrize("version", ["0.27.1", "0.33.0", "1.0.0", "nightly"])
def test_versions_that_are_not_supported(version):
    from megatron_sorted.serving.vllm.checks import check_version

    with pytest.raises(
        PlatformError, match=f"^vLLM {version}: the plug-in supports 0.28 and newer"
    ):
        check_version(version)


def test_versions_that_are_supported(monkeypatch):
    from megatron_sorted.serving.vllm import checks

    lines = []
    logger = type("Logger", (), {"warning": lambda self, *values: lines.append(values)})
    monkeypatch.setattr(checks, "init_logger", lambda _name: logger())
    for version in (*VLLM_TESTED, f"{VLLM_TESTED[0]}+cpu"):
        checks.check_version(version)
    assert not lines
    checks.check_version("0.30.0")
    assert lines[0][1] == "0.30.0"


def test_hooks_of_other_versions():
    """A proposer like that of vllm-ascend, whose methods take more."""
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    from megatron_sorted.serving.vllm.checks import check_hooks

    check_hooks()

    class Other(DraftModelProposer):
        def set_inputs_first_pass(self, target_token_ids, req_scheduled_tokens=None):
            raise NotImplementedError

    class Without(DraftModelProposer):
        propose = None

    for proposer, method in ((Other, "set_inputs_first_pass"), (Without, "propose")):
        with pytest.raises(PlatformError, match=f"{proposer.__name__}.{method} .* --depth K"):
            check_hooks(proposer)


def test_parts_that_are_missing_from_the_file(tmp_path, no_weights):
    """Found when exits are read, before the model's own weights where a depth is served."""
    from megatron_sorted.errors import CheckpointError
    from megatron_sorted.serving.vllm.exits import read_exits_of
    from megatron_sorted.serving.vllm.parts import read_parts

    directory = write_model(tmp_path / "model", own=("norm",))
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "exit_adapter_rank": 8}))
    with pytest.raises(CheckpointError, match=r"exit 2 has norm, and .* declares adapter"):
        read_parts(read_exits_of(directory), 2)
    (directory / "exits.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_parts(read_exits_of(directory), 2)


def test_a_model_without_the_plug_in_is_vllm_s_own(model):
    """Our classes have names of their own; no class of vLLM is replaced."""
    from vllm import ModelRegistry

    from megatron_sorted.serving.vllm.plugin import register

    register()
    own = {name for name in ModelRegistry.get_supported_archs() if name.startswith("Nested")}
    assert own == {f"Nested{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
    assert "megatron" not in str(ModelRegistry.models["LlamaForCausalLM"])
