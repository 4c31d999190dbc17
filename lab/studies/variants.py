"""Variants: methods to train one nested model, each a name and the flags it adds to uniform."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FAMILIES = {
    "static": "Fixed coefficients: the front",
    "learned": "Learned coefficients",
    "schedule": "Schedules and sampling",
    "gradient": "Gradient rules",
    "distillation": "Self-distillation",
    "teacher": "Distillation from a frozen model: the start, or the separately trained one of"
    " full depth",
    "capacity": "More parameters at the exits",
    "combined": "Combinations: taught by the separately trained one of full depth",
    "longer": "With the teacher's steps spent otherwise: twice the steps, or from the separately"
    " trained model of full depth on",
}
UNIFORM = "uniform"


@dataclass(frozen=True)
class Variant:
    """One method of training.

    Attributes:
        family: A key of `FAMILIES`.
        flags: Flags of pretrain_sorted.py. {start} becomes the directory of the model at the start,
            {separate} that of the separately trained model of full depth and the same seed,
            {others:X} X for each intermediate exit, {references} the losses of the separately
            trained models, {full} that of the full one, {part:X} this share of all steps.
        rate: Factor of the learning rate, 1 except for static weights; their front includes rates.
        steps: Factor of the steps.
        goes_on: Whether it continues from the separately trained model of full depth and this seed.
    """

    name: str
    family: str
    title: str
    flags: tuple[str, ...] = ()
    rate: float = 1.0
    steps: int = 1
    goes_on: bool = False

    @property
    def needs_references(self) -> bool:
        """Whether it uses the losses of separately trained models."""
        return bool({"{references}", "{full}"} & set(self.flags))

    @property
    def needs_full_model(self) -> bool:
        """Whether it uses the separately trained model of full depth, trained before it."""
        return self.goes_on or "{separate}" in self.flags


def _others(share: str) -> tuple[str, ...]:
    return "--exit-layer-weight", f"{{others:{share}}}", "1"


def _taught(weight: str, teacher: str = "{separate}") -> tuple[str, ...]:
    return "--exit-kd-weight", weight, "--exit-kd-teacher", teacher


def _cool_down(share: str) -> tuple[str, ...]:
    return (
        *_others(share),
        "--exit-layer-weight-init",
        "{others:1}",
        "1",
        "--exit-layer-weight-warmup-iters",
        "{part:1}",
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(UNIFORM, "static", "uniform (SoFT)"),
        Variant("linear", "static", "linear in depth", ("--exit-layer-weight-rule", "linear")),
        Variant(
            "layerskip",
            "static",
            "LayerSkip's depth rule",
            ("--exit-layer-weight-rule", "layerskip"),
        ),
        Variant("others-0.3", "static", "others 0.3 of the last", _others("0.3")),
        Variant("others-0.1", "static", "others 0.1 of the last", _others("0.1")),
        Variant("others-0.03", "static", "others 0.03 of the last", _others("0.03")),
        Variant("uniform-slow", "static", "uniform, a third of the rate", rate=1 / 3),
        Variant(
            "others-0.3-slow",
            "static",
            "others 0.3, a third of the rate",
            _others("0.3"),
            rate=1 / 3,
        ),
        Variant(
            "uncertainty", "learned", "uncertainty", ("--exit-layer-weight-rule", "uncertainty")
        ),
        Variant(
            "inverse-loss", "learned", "inverse loss", ("--exit-layer-weight-rule", "inverse_loss")
        ),
        Variant("dwa", "learned", "dynamic weight average", ("--exit-layer-weight-rule", "dwa")),
        Variant(
            "gradnorm", "learned", "GradNorm at the taps", ("--exit-layer-weight-rule", "gradnorm")
        ),
        Variant(
            "simulated-exit",
            "learned",
            "simulated exit (COSEE)",
            ("--exit-layer-weight-rule", "simulated_exit"),
        ),
        Variant(
            "excess-loss",
            "learned",
            "excess loss over separate models",
            ("--exit-layer-weight-rule", "excess_loss", "--exit-reference-loss", "{references}"),
        ),
        Variant(
            "guard",
            "learned",
            "uniform, full model guarded",
            ("--exit-guard", "--exit-guard-loss", "{full}"),
        ),
        Variant("cool-down", "schedule", "others from 1 down to 0.1", _cool_down("0.1")),
        Variant("rotation", "schedule", "rotation", ("--exit-curriculum", "rotation")),
        Variant("gradual", "schedule", "gradual", ("--exit-curriculum", "gradual")),
        Variant("sampled", "schedule", "one exit drawn a step", ("--exit-sampling", "uniform")),
        Variant(
            "sampled-excess",
            "schedule",
            "drawn by excess loss",
            (
                "--exit-sampling",
                "coefficients",
                "--exit-layer-weight-rule",
                "excess_loss",
                "--exit-reference-loss",
                "{references}",
            ),
        ),
        Variant("layer-dropout", "schedule", "layer dropout 0.1", ("--layer-dropout", "0.1")),
        Variant(
            "equilibrium",
            "gradient",
            "gradient equilibrium (IMTA)",
            ("--exit-gradient-rule", "equilibrium"),
        ),
        Variant(
            "balance", "gradient", "norms balanced a token", ("--exit-gradient-rule", "balance")
        ),
        Variant(
            "project", "gradient", "conflicts projected, token", ("--exit-gradient-rule", "project")
        ),
        Variant(
            "project-batch",
            "gradient",
            "conflicts projected, batch",
            ("--exit-gradient-rule", "project", "--exit-gradient-scope", "micro-batch"),
        ),
        Variant("kd-0.5", "distillation", "half KL to the last exit", ("--exit-kd-weight", "0.5")),
        Variant("kd-1", "distillation", "KL to the last exit alone", ("--exit-kd-weight", "1")),
        Variant(
            "kd-0.5-others-0.3",
            "distillation",
            "half KL, others 0.3",
            ("--exit-kd-weight", "0.5", *_others("0.3")),
        ),
        Variant("start-0.5", "teacher", "half KL to the start", _taught("0.5", "{start}")),
        Variant("start-1", "teacher", "KL to the start alone", _taught("1", "{start}")),
        Variant("taught-0.5", "teacher", "half KL to the trained one", _taught("0.5")),
        Variant("taught-1", "teacher", "KL to the trained one alone", _taught("1")),
        Variant(
            "taught-1-warm",
            "teacher",
            "KL to the trained one, temperature 2",
            (*_taught("1"), "--exit-kd-temperature", "2"),
        ),
        Variant(
            "taught-1-top-16",
            "teacher",
            "KL to the trained one's 16 likeliest",
            (*_taught("1"), "--exit-kd-top-k", "16"),
        ),
        Variant("own-norms", "capacity", "own norms", ("--use-exit-norm",)),
        Variant(
            "own-heads",
            "capacity",
            "own norms and heads",
            ("--use-exit-norm", "--untie-exit-output-weights"),
        ),
        Variant(
            "adapters", "capacity", "low-rank adapters (rank 16)", ("--exit-adapter-rank", "16")
        ),
        Variant("mlps", "capacity", "an MLP an exit", ("--use-exit-norm", "--use-exit-mlp")),
        Variant("blocks", "capacity", "a layer an exit", ("--use-exit-norm", "--use-exit-block")),
        Variant(
            "taught-others-0.5", "combined", "KL, others 0.5", (*_taught("1"), *_others("0.5"))
        ),
        Variant(
            "taught-others-0.3", "combined", "KL, others 0.3", (*_taught("1"), *_others("0.3"))
        ),
        Variant(
            "taught-others-0.2", "combined", "KL, others 0.2", (*_taught("1"), *_others("0.2"))
        ),
        Variant(
            "taught-heads-0.3",
            "combined",
            "KL, others 0.3, own norms and heads",
            (*_taught("1"), *_others("0.3"), "--use-exit-norm", "--untie-exit-output-weights"),
        ),
        Variant(
            "taught-adapters-0.3",
            "combined",
            "KL, others 0.3, adapters",
            (*_taught("1"), *_others("0.3"), "--exit-adapter-rank", "16"),
        ),
        Variant("longer", "longer", "uniform, twice the steps", steps=2),
        Variant("longer-0.3", "longer", "others 0.3, twice the steps", _others("0.3"), steps=2),
        Variant("on", "longer", "uniform, from the trained one on", goes_on=True),
        Variant(
            "on-taught", "longer", "KL to the trained one, from it on", _taught("1"), goes_on=True
        ),
        Variant(
            "on-taught-0.3",
            "longer",
            "the same, others 0.3",
            (*_taught("1"), *_others("0.3")),
            goes_on=True,
        ),
    )
}


def expand(
    variant: Variant,
    depths: Sequence[int],
    references: Mapping[int, float],
    num_steps: int,
    teachers: Mapping[str, str],
) -> list[str]:
    """Return the flags of a variant.

    Args:
        variant: The variant.
        depths: All exits; the last is the full model.
        references: {depth: loss} of the separately trained models on the samples for tuning.
        num_steps: Steps of the training.
        teachers: Directories: "start" of the model that all start from, and "separate" of the
            separately trained model of full depth.
    """
    flags: list[str] = []
    for word in variant.flags:
        kind, _, value = word.strip("{}").partition(":") if word.startswith("{") else ("", "", "")
        if kind == "others":
            flags += [value] * (len(depths) - 1)
        elif kind == "references":
            flags += [f"{references[depth]:.4f}" for depth in depths]
        elif kind == "full":
            flags.append(f"{references[depths[-1]]:.4f}")
        elif kind in ("start", "separate"):
            flags.append(teachers[kind])
        elif kind == "part":
            flags.append(str(max(1, round(float(value) * num_steps))))
        else:
            flags.append(word)
    return flags
