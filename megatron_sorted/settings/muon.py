"""Settings of Muon, and their rules."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require


@dataclass(frozen=True)
class MuonSettings:
    """Options of ``--optimizer muon``, named as in Megatron-LM.

    Muon updates the matrices of layers and of exits' own parts (Jordan et al., 2024; arXiv
    2502.16982); Adam updates embeddings, output matrices, norms and biases, with its own settings.
    """

    muon_momentum: float = setting(0.95, "Muon's decay of the momentum.")
    muon_nesterov: bool = setting(False, "Nesterov's form of Muon's momentum.")
    muon_split_qkv: bool = setting(
        True, "Make the update of queries, keys and values orthogonal one by one."
    )
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = setting(
        "spectral",
        "Factor of an update of a matrix of m rows and n columns: sqrt(max(m, n)) (spectral), "
        "sqrt(m / n) (unit_rms_norm), or sqrt(max(1, m / n)) (shape_scaling).",
    )
    muon_extra_scale_factor: float = setting(
        1.0,
        "Further factor of Muon's updates; with spectral, 0.2 makes them about as large as Adam's.",
    )
    muon_num_ns_steps: int = setting(5, "Number of Newton-Schulz steps of an update.")
    muon_coefficient_type: Literal["quintic", "simple", "polar_express"] = setting(
        "quintic",
        "Coefficients of the Newton-Schulz steps: five that differ (quintic), the same each time "
        "(simple), or eight that differ (polar_express, arXiv 2505.16932).",
    )
    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = setting(
        "medium",
        "Precision of the Newton-Schulz products: bf16 (medium), tf32 where the device has it "
        "(high), or fp32 (highest).",
    )
    muon_tp_mode: Literal["duplicated", "distributed", "blockwise"] = setting(
        "duplicated",
        "How tensor parallel ranks make the update of a matrix orthogonal: each gathers all of it "
        "(duplicated), they share the work (distributed), or each its own part alone (blockwise; "
        "the trained weights then depend on --tensor-model-parallel-size).",
    )


def check_muon(settings: AllSettings) -> None:
    """Check that Muon can train this network; raise `SettingsError` if not."""
    if settings.optimizer != "muon":
        for field in dataclasses.fields(MuonSettings):
            require(
                getattr(settings, field.name) == field.default,
                f"{flag_of(field.name)}: has an effect with --optimizer muon only, not with "
                f"{settings.optimizer}. Give that as well, or leave it out.",
            )
        return
    for flag, value, reason in (
        ("--fp16", settings.fp16, "megatron's Muon has no loss scaling. Use --bf16"),
        (
            f"--lora-rank {settings.lora_rank}",
            settings.lora_rank,
            "Muon on the two factors of an adapter is not tested in this program. Use adam",
        ),
        (
            f"--num-experts {settings.num_experts}",
            settings.num_experts,
            "Muon on the matrices of experts and routers is not tested in this program. Use adam",
        ),
    ):
        require(not value, f"--optimizer: muon with {flag}: {reason}, or leave it out.")
