"""Rotary positions of a network: the values from which `megatron_sorted.rotary` computes them.

`rope_of` reads them from the settings, `conversion.hugging_face.rope_keys` from a config.json.
"""

import math
from dataclasses import dataclass

from megatron_sorted.settings.derived import kv_channels
from megatron_sorted.settings.field import AllSettings

PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
    "dynamic": ("factor", "original_max_position_embeddings"),
}
"""{type of scaling: its parameters}; the setting of ``factor`` is ``rope_scaling_factor``."""
DEFAULTS = {
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0},
}
"""Parameters that need not be given, with Megatron-LM's values."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a network.

    Attributes:
        width: Number of rotated channels of a head.
        base: Base of the frequencies (theta).
        kind: Type of scaling: default, linear, llama3, yarn, dynamic, or longrope (read from a
            config.json only).
        factor: How many times longer texts may become; 1 for default and longrope.
        context: Length in tokens that the model was first trained with; None where the type does
            not use it.
        low, high: llama3: turns within the context below which a frequency is divided by the
            factor, and above which it stays.
        beta_fast, beta_slow: yarn: turns within the context above which a frequency stays, and
            below which it is divided by the factor.
        truncate: yarn: whether the two channels found from the betas are rounded outwards.
        attention_factor: Factor of cos and sin, by which attention becomes sharper.
        resonance: Whether wavelengths are rounded to whole numbers of tokens.
        short, long: longrope: divisors of the frequencies [width / 2] for texts of at most
            ``context`` tokens, and for longer ones.
    """

    width: int
    base: float
    kind: str = "default"
    factor: float = 1.0
    context: int | None = None
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    resonance: bool = False
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @property
    def constant_tokens(self) -> int | None:
        """Return up to which length the frequencies are the same; None: for every length.

        Beyond it keys that a cache holds would have been rotated by other frequencies.
        """
        is_constant = self.kind != "dynamic" and self.short == self.long
        return None if is_constant else self.context

    @property
    def longest(self) -> int | None:
        """Return the longest text in tokens that the scaling is meant for; None if it is open."""
        return math.ceil(self.factor * self.context) if self.kind == "yarn" else None

    def __str__(self) -> str:
        """Return the type, its factor and whether wavelengths are whole, as a plan shows them."""
        text = self.kind
        if self.kind not in ("default", "longrope"):
            text += f" x {self.factor:g}"
        if self.context is not None:
            text += f" from {self.context:,} tokens"
        if self.attention_factor != 1.0:
            text += f", attention x {self.attention_factor:.4f}"
        return text + ", resonance" * self.resonance


def scaling_type(settings: AllSettings) -> str:
    """Return the type of scaling, however the settings name it (settings that have been checked).

    ``use_rope_scaling`` and ``rotary_seq_len_interpolation_factor`` are Megatron-LM's settings for
    llama3 and linear.
    """
    if settings.rope_scaling_type is not None:
        return settings.rope_scaling_type
    if settings.use_rope_scaling:
        return "llama3"
    return "default" if settings.rotary_seq_len_interpolation_factor is None else "linear"


def names_scaling(settings: AllSettings) -> bool:
    """Return whether the settings name a scaling, even that there is none."""
    return (
        settings.rope_scaling_type is not None
        or scaling_type(settings) != "default"
        or settings.rope_resonance
    )


def rope_of(settings: AllSettings) -> Rope | None:
    """Return the rotary positions of a run; None where positions are embedded otherwise."""
    if settings.position_embedding_type != "rope":
        return None
    kind = scaling_type(settings)
    values = dict(DEFAULTS.get(kind, {}))
    for name in PARAMETERS[kind]:
        value = getattr(settings, f"rope_scaling_{name}")
        if value is not None:
            values[name] = value
    if kind == "linear" and settings.rotary_seq_len_interpolation_factor is not None:
        values["factor"] = settings.rotary_seq_len_interpolation_factor
    sharper = 1.0
    if kind == "yarn":
        scales = (values.pop("mscale"), values.pop("mscale_all_dim"))
        sharper = values.pop("attention_factor", None) or yarn_attention(values["factor"], *scales)
    renamed = {
        "original_max_position_embeddings": "context",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
    }
    return Rope(
        width=int(kv_channels(settings) * settings.rotary_percent),
        base=float(settings.rotary_base),
        kind=kind,
        attention_factor=sharper,
        resonance=settings.rope_resonance,
        **{renamed.get(name, name): value for name, value in values.items()},
    )


def yarn_attention(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """Return YaRN's factor of cos and sin.

    Source: YaRN (Peng et al. 2023, arXiv 2309.00071, eq. 22: 0.1 ln s + 1), with the two weights
        that DeepSeek-V2 and Megatron-core put on the logarithm.

    >>> round(yarn_attention(4.0), 4), yarn_attention(1.0), yarn_attention(4.0, 0.7, 0.7)
    (1.1386, 1.0, 1.0)
    """

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim)
