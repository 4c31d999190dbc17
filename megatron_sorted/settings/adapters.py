"""Low-rank adapters on the layers' matrices: train those and freeze the network they adapt."""

from dataclasses import dataclass

from megatron_sorted.settings.field import setting


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (LoRA, DyLoRA) on a frozen network."""

    lora_rank: int = setting(
        0, "Rank of a trained product B A added to each target's matrix, all else but the exits' own parts being frozen; 0: none.")
    lora_alpha: float = setting(32.0, "The product counts --lora-alpha / rank.")
    lora_targets: tuple[str, ...] = setting(
        ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), "Matrices of every layer that get an adapter.")
    lora_dropout: float = setting(0.0, "Dropout on what an adapter reads.")
    dylora: bool = setting(
        False, "Nested ranks (DyLoRA): each step draws a rank b and uses the first b ranks, so that the adapter can be cut to any of them.")
    dylora_frozen: bool = setting(False, "With --dylora: only rank b trains at a step, those below it are used as they are.")
    dylora_ranks: tuple[int, ...] = setting((), "With --dylora: ranks to draw from, --lora-rank among them; by default 1, 2, ..., rank.")
