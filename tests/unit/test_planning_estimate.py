"""What a plan says of known models, and of layouts of one."""

from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.devices import DEVICES, device_named
from megatron_sorted.planning.estimate import Plan, make_plan
from megatron_sorted.planning.search import search
from megatron_sorted.settings.check import check_settings
from megatron_sorted.settings.costs import train_flops_per_token
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.run import Settings
from tests.rules.sources import ROOT

SEVEN = Settings(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, seq_length=4096, vocab_size=32000,
                 untie_embeddings_and_output_weights=True, exit_layer_nums=(8, 16, 24), bf16=True, mock_data=True, global_batch_size=64,
                 make_vocab_size_divisible_by=1)


def plan_of(world_size: int, **changes) -> Plan:
    """Returns the plan of LLaMA 2 7B with exits on A100s."""
    settings = replace(SEVEN, **changes)
    check_settings(settings, world_size)
    return make_plan(settings, 32000, world_size, DEVICES["A100"], 2048)


LAYOUTS = {
    "one": (1, {}),
    "tp4 sequence parallel": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
    "pp4 chunks": (4, {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 4}),
    "tp2 pp2 dp2": (8, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_and_operations_do_not_depend_on_the_layout(name):
    world_size, changes = LAYOUTS[name]
    plan = plan_of(world_size, **changes)
    assert plan.parameters == 6_738_415_616  # as published
    heads = sum(stage.parameters["heads"] > 0 for stage in plan.stages)
    norms = sum(stage.parameters["norms"] > 0 for stage in plan.stages)
    tp = plan.tensor_size
    replicated = (tp - 1) * (65 + norms - 1) * 4096  # norms are whole on every tensor parallel rank
    copies = (heads - 1) * 32000 * 4096 + (norms - 1) * 4096
    assert plan.stored_parameters == 6_738_415_616 + copies + replicated
    # operations of all ranks: attention over all pairs, where MFU's count has half of them
    done = plan.data_size * tp * sum(stage.operations for stage in plan.stages)
    attention = 3 * 2 * 4096 * 4096 * 32
    assert done == plan.tokens * (train_flops_per_token(SEVEN, 32000) + attention)


def test_recomputation_costs_operations_and_saves_memory():
    plain, full = plan_of(1), plan_of(1, recompute_granularity="full")
    forward = plain.tokens * 32 * 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 * 4096)
    assert full.stages[0].operations - plain.stages[0].operations == forward
    assert full.stages[0].memory.activations < plain.stages[0].memory.activations / 10
    assert full.seconds > plain.seconds and full.mfu < plain.mfu


def test_states_are_bytes_a_parameter():
    memory, parameters = plan_of(1).stages[0].memory, 6_738_415_616
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    sharded = plan_of(4, use_distributed_optimizer=True).stages[0].memory
    assert sharded.optimizer == 3 * parameters and sharded.states == 9 * parameters


def test_the_recipe_of_38_billion_is_what_its_source_says():
    path = str(ROOT / "examples" / "pangu_38b_16x8.yaml")
    settings = load_settings(["--config", path])
    plan = make_plan(settings, 165664, 128, DEVICES["910B2"], 2048)
    assert (plan.tensor_size, plan.pipeline_size, plan.num_chunks, plan.data_size, plan.num_micro_batches) == (8, 4, 4, 4, 32)
    assert plan.parameters == pytest.approx(39.1e9, rel=1e-3)
    assert [sum(c.num_layers for c in stage.chunks) for stage in plan.stages] == [16, 16, 16, 14]
    assert {e for stage in plan.stages for c in stage.chunks for e in c.exits} == {16, 32, 46, 62}
    assert plan.stages[0].operations == pytest.approx(2038.5e12, rel=1e-4)  # counted over Megatron's own model, without exits on stage 0
    assert plan.peak_bytes < DEVICES["910B2"].memory_bytes
    plain = make_plan(replace(settings, exit_layer_nums=()), 165664, 128, DEVICES["910B2"], 2048)
    assert plain.seconds == pytest.approx(11.5, rel=0.2)  # published, without exits


def test_search_finds_layouts_that_fit_the_fastest_first():
    device = DEVICES["A100"]
    found, tried, least = search(replace(SEVEN, num_layers=8, exit_layer_nums=(2, 4, 6)), 32000, 4, device, 2048, 40 * 10**9)
    assert 10 < len(found) <= tried and least < 40 * 10**9
    seconds = [proposal.plan.seconds for proposal in found]
    assert seconds == sorted(seconds) and all(proposal.plan.peak_bytes <= 40 * 10**9 for proposal in found)
    for proposal in found[:3]:
        check_settings(proposal.settings, 4)
        assert make_plan(proposal.settings, 32000, 4, device, 2048) == proposal.plan
    assert search(replace(SEVEN, num_layers=8, exit_layer_nums=(2, 4, 6)), 32000, 4, device, 2048, 10**9)[0] == []


@pytest.mark.parametrize("changes", [{"lora_rank": 4}, {"exit_kd_weight": 0.5}, {"num_experts": 4}, {"exit_adapter_rank": 2}])
def test_what_is_not_counted_is_refused(changes):
    with pytest.raises(SettingsError, match=f"--{next(iter(changes)).replace('_', '-')}: .* is not counted"):
        make_plan(replace(SEVEN, **changes), 32000, 1, DEVICES["A100"], 2048)


def test_devices_come_from_the_table_or_a_file(tmp_path):
    with pytest.raises(SettingsError, match=r"--planned-device: X100 is not in the table"):
        device_named("X100")
    path = tmp_path / "device.json"
    path.write_text('{"single_flops": 5e10}')
    assert device_named("cpu", path) == replace(DEVICES["cpu"], single_flops=5e10)
    for text in ('{"speed": 1}', "[1]", "{"):
        path.write_text(text)
        with pytest.raises(SettingsError, match="--device-file"):
            device_named("cpu", path)
