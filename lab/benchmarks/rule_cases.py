"""The cases on the page of rules: one small network with different rules for its exits."""

from dataclasses import replace

from lab.benchmarks.flops import forward_flops_per_token, step_flops
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import taught_exits, trained_exits
from megatron_sorted.settings.run import Settings

BASE = "uniform"
RANDOM_TEACHER = "a random model of the same network"
"""Stands for a model that is made where it is needed; its weights do not matter for its cost."""
CASES: dict[str, dict] = {
    BASE: {},
    "equilibrium": {"exit_gradient_rule": "equilibrium"},
    "balance": {"exit_gradient_rule": "balance"},
    "balance, micro-batch": {"exit_gradient_rule": "balance", "exit_gradient_scope": "micro-batch"},
    "project": {"exit_gradient_rule": "project"},
    "project, micro-batch": {"exit_gradient_rule": "project", "exit_gradient_scope": "micro-batch"},
    "gradients measured": {"log_exit_gradients": True},
    "uncertainty": {"exit_layer_weight_rule": "uncertainty"},
    "inverse loss": {"exit_layer_weight_rule": "inverse_loss"},
    "dwa": {"exit_layer_weight_rule": "dwa"},
    "gradnorm": {"exit_layer_weight_rule": "gradnorm"},
    "simulated exit": {"exit_layer_weight_rule": "simulated_exit"},
    "excess loss": {
        "exit_layer_weight_rule": "excess_loss",
        "exit_reference_loss": (4.0, 3.0, 2.0, 1.0),
    },
    "guard": {"exit_guard": True, "exit_guard_loss": 1.0},
    "distillation": {"exit_kd_weight": 0.5},
    "distillation, T 2": {"exit_kd_weight": 0.5, "exit_kd_temperature": 2.0},
    "distillation, T 2, top 50": {
        "exit_kd_weight": 0.5,
        "exit_kd_temperature": 2.0,
        "exit_kd_top_k": 50,
    },
    "a frozen teacher": {"exit_kd_weight": 0.5, "exit_kd_teacher": RANDOM_TEACHER},
}
"""Name -> settings that differ from those of the first, with which all others are compared."""


def rule_settings(name: str, device: str, bf16: bool) -> Settings:
    """Return the run of a case: 8 LLaMA layers with 3 early exits.

    A head costs 1.3 layers, as in models of a billion parameters.
    """
    base = Settings(
        num_layers=8,
        hidden_size=768,
        num_attention_heads=12,
        seq_length=256,
        vocab_size=12_032,
        micro_batch_size=1,
        global_batch_size=1,
        exit_layer_nums=(2, 4, 6),
        mock_data=True,
        device=device,
        bf16=bf16,
        train_iters=1000,
        lr=1e-4,
        lr_decay_style="constant",
    )
    return replace(base, **CASES[name])


def case_flops(settings: Settings) -> int:
    """Return the operations of one step.

    Each exit takes three products with its head, and a fourth if it has a teacher. A frozen teacher
    adds its own layers in forward.
    """
    trained = trained_exits(settings, coefficient_rule(settings), 0)
    tokens = settings.global_batch_size * settings.seq_length
    fourth = 2 * settings.hidden_size * settings.vocab_size * tokens
    layers = (
        tokens * settings.num_layers * forward_flops_per_token(settings)[0]
        if settings.exit_kd_teacher is not None
        else 0
    )
    return (
        step_flops(settings, len(trained)) + len(taught_exits(settings, trained)) * fourth + layers
    )
