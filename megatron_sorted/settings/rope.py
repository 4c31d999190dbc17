"""Settings of rotary positions and of their scaling to longer texts, with their rules."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.derived import kv_channels
from megatron_sorted.settings.field import AllSettings, flag_of, setting
from megatron_sorted.settings.require import require
from megatron_sorted.settings.rope_scaling import DEFAULTS, PARAMETERS, rope_of, scaling_type


@dataclass(frozen=True)
class RopeSettings:
    """Rotary positions and their scaling to longer texts."""

    rotary_base: int = setting(10000, "Base of the rotary frequencies (theta).")
    rotary_percent: float = setting(1.0, "Fraction of each head's channels that is rotated.")
    rotary_seq_len_interpolation_factor: float | None = setting(
        None, "The same as --rope-scaling-type linear with this --rope-scaling-factor."
    )
    use_rope_scaling: bool = setting(False, "The same as --rope-scaling-type llama3.")
    rope_scaling_type: Literal["default", "linear", "llama3", "yarn", "dynamic"] | None = setting(
        None,
        "How rotary frequencies are scaled to longer texts: not (default), all divided by the "
        "factor (linear), the slow ones (llama3, yarn), or by a base that grows with the text "
        "(dynamic).",
    )
    rope_scaling_factor: float | None = setting(
        None,
        "How many times longer texts become: divisor of the lowest frequencies; 8 by default with "
        "llama3, to be given with the other types.",
    )
    rope_scaling_original_max_position_embeddings: int | None = setting(
        None,
        "The context length that the model was first trained with; 8192 by default with llama3, to "
        "be given with yarn and dynamic.",
    )
    rope_scaling_low_freq_factor: float | None = setting(
        None,
        "llama3: frequencies with fewer turns than this within the original context are divided in "
        "full; by default 1.",
    )
    rope_scaling_high_freq_factor: float | None = setting(
        None,
        "llama3: frequencies with more turns than this within the original context stay as they "
        "are; by default 4.",
    )
    rope_scaling_beta_fast: float | None = setting(
        None,
        "yarn: frequencies with more turns than this within the original context stay as they are; "
        "by default 32.",
    )
    rope_scaling_beta_slow: float | None = setting(
        None,
        "yarn: frequencies with fewer turns than this within the original context are divided in "
        "full; by default 1.",
    )
    rope_scaling_mscale: float | None = setting(
        None, "yarn: cos and sin are multiplied by 0.1 x this x ln(factor) + 1; by default 1."
    )
    rope_scaling_mscale_all_dim: float | None = setting(
        None, "yarn: cos and sin are divided by 0.1 x this x ln(factor) + 1; by default 0."
    )
    rope_scaling_attention_factor: float | None = setting(
        None, "yarn: factor of cos and sin, in place of the two mscales."
    )
    rope_scaling_truncate: bool | None = setting(
        None,
        "yarn: round the channels between which frequencies are divided in part outwards to whole "
        "numbers; by default they are.",
    )
    rope_resonance: bool = setting(
        False,
        "Round the wavelengths of the (scaled) rotary frequencies to whole numbers of tokens "
        "(Resonance RoPE).",
    )


def check_rope(settings: AllSettings) -> None:
    """Check that one type of scaling is named, that it is defined, and that it suits the network.

    Raises:
        SettingsError: It does not.
    """
    if settings.position_embedding_type != "rope":
        _refuse_all(settings)
        return
    rotated = int(kv_channels(settings) * settings.rotary_percent)
    require(
        rotated > 0 and rotated % 2 == 0,
        f"--rotary-percent: {settings.rotary_percent} of {kv_channels(settings)} channels a "
        f"head are {rotated}; the rotary embedding needs pairs. Change --kv-channels, "
        "--num-attention-heads or --rotary-percent.",
    )
    _check_one_type(settings)
    _check_parameters(settings, scaling_type(settings))
    rope = rope_of(settings)
    require(
        rope.kind != "dynamic" or rotated > 2,
        f"--rope-scaling-type: dynamic spreads its change over the pairs of channels, and there is "
        f"one ({rotated} rotated channels). Use yarn, or wider heads.",
    )
    require(
        rope.longest is None or settings.seq_length <= rope.longest,
        f"--seq-length: {settings.seq_length} is more than yarn's {rope.longest} tokens "
        f"(--rope-scaling-factor {rope.factor:g} x --rope-scaling-original-max-position-embeddings "
        f"{rope.context}). Raise the factor or shorten the samples.",
    )


def _refuse_all(settings: AllSettings) -> None:
    """Refuse every setting of scaling where no positions are rotated."""
    names = [name for name in RopeSettings.__dataclass_fields__ if not name.startswith("rotary_b")]
    for name in names:
        field = RopeSettings.__dataclass_fields__[name]
        require(
            name == "rotary_percent" or getattr(settings, name) == field.default,
            f"{flag_of(name)}: there are no rotary frequencies with --position-embedding-type "
            f"{settings.position_embedding_type}. Leave it out.",
        )


def _check_one_type(settings: AllSettings) -> None:
    """Check that the three settings that name a type of scaling do not contradict each other."""
    factor = settings.rotary_seq_len_interpolation_factor
    require(
        factor is None or factor >= 1,
        f"--rotary-seq-len-interpolation-factor: {factor} would shorten the context. Give 1 or "
        "more.",
    )
    kind = settings.rope_scaling_type
    require(
        factor is None or not settings.use_rope_scaling,
        f"--rotary-seq-len-interpolation-factor: {factor} together with --use-rope-scaling, but "
        "only one of them can extend the context. Give one.",
    )
    for flag, is_given, means in (
        (f"--rotary-seq-len-interpolation-factor {factor}", factor is not None, "linear"),
        ("--use-rope-scaling", settings.use_rope_scaling, "llama3"),
    ):
        require(
            not is_given or kind in (None, means),
            f"--rope-scaling-type: {kind} together with {flag}, which means {means}. Give one.",
        )
    require(
        factor is None or settings.rope_scaling_factor in (None, factor),
        f"--rope-scaling-factor: {settings.rope_scaling_factor} together with "
        f"--rotary-seq-len-interpolation-factor {factor}: two factors. Give one.",
    )


def _check_parameters(settings: AllSettings, kind: str) -> None:
    """Check that a type of scaling has its parameters, no others, and that their values fit."""

    def given(name: str):
        return getattr(settings, f"rope_scaling_{name}")

    for name in dict.fromkeys(name for names in PARAMETERS.values() for name in names):
        users = [one for one, names in PARAMETERS.items() if name in names]
        require(
            given(name) is None or kind in users,
            f"{flag_of(f'rope_scaling_{name}')}: {given(name)} has no effect with "
            f"--rope-scaling-type {kind}; it is a parameter of {', '.join(users)}. Give such a "
            "type, or leave it out.",
        )
    interpolated = settings.rotary_seq_len_interpolation_factor
    for name in ("factor", "original_max_position_embeddings"):
        is_needed = name in PARAMETERS[kind] and name not in DEFAULTS.get(kind, {})
        is_given = given(name) is not None or (name == "factor" and interpolated is not None)
        require(
            is_given or not is_needed,
            f"{flag_of(f'rope_scaling_{name}')}: not given, and --rope-scaling-type {kind} needs "
            "it. "
            + (
                "Give how many times longer texts become."
                if name == "factor"
                else "Give the context length that the model was first trained with."
            ),
        )
    factor = settings.rope_scaling_factor
    require(
        factor is None or factor >= 1,
        f"--rope-scaling-factor: {factor} would shorten the context. Give 1 or more.",
    )
    _check_pair(settings, kind, "llama3", "low_freq_factor", "high_freq_factor")
    _check_pair(settings, kind, "yarn", "beta_slow", "beta_fast")
    require(
        given("attention_factor") is None
        or (given("mscale") is None and given("mscale_all_dim") is None),
        f"--rope-scaling-attention-factor: {given('attention_factor')} together with "
        "--rope-scaling-mscale or --rope-scaling-mscale-all-dim, which it replaces. Leave one out.",
    )
    require(
        kind != "yarn" or settings.rotary_base > 1,
        f"--rotary-base: {settings.rotary_base} gives all channels one frequency, between which "
        "yarn cannot tell. Give a larger base.",
    )


def _check_pair(settings: AllSettings, kind: str, of: str, lower: str, upper: str) -> None:
    """Check that of two numbers of turns the one for slow frequencies is the smaller one."""
    if kind != of:
        return
    names = (lower, upper)
    values = [
        DEFAULTS[of][name]
        if (value := getattr(settings, f"rope_scaling_{name}")) is None
        else value
        for name in names
    ]
    require(
        values[0] < values[1],
        f"{flag_of(f'rope_scaling_{lower}')}: {values[0]} is not below "
        f"{flag_of(f'rope_scaling_{upper}')} {values[1]}. Frequencies between the two are divided "
        "in part; lower the first or raise the second.",
    )
