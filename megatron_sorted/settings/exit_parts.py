"""What an intermediate exit may own besides a norm and a head, and whether anything else trains."""

from dataclasses import dataclass

from megatron_sorted.settings.field import setting


@dataclass(frozen=True)
class ExitPartSettings:
    """Parts between an exit's hidden state and its norm, in EE-LLM's words where it has them; the last exit never has any."""

    use_exit_block: bool = setting(
        False, "Every intermediate exit has a layer of its own before its norm (Balcony); it begins as a copy of the last one.")
    use_exit_mlp: bool = setting(
        False, "Every intermediate exit has a normed MLP of its own before its norm (EE-Tuning); it begins as a copy of the last layer's.")
    exit_adapter_rank: int = setting(
        0, "Rank of a low-rank adapter that every intermediate exit adds to its hidden state before its norm; 0: none. It begins at zero.")
    tune_exit: bool = setting(
        False, "Train only what the intermediate exits own; all else is frozen and keeps its bits.")
