"""The steps of a study of one data set: separate models of every depth, and every variant."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lab.results.rates import choose_rate, trainer_losses
from lab.results.recipe import Recipe, prefix, run_flags, train_command
from lab.results.steps import OURS, ROOT, Step
from lab.studies.outcomes import Outcomes
from lab.studies.variants import UNIFORM, Variant, expand
from megatron_sorted.reporting.run_reports import read_run


class StudyPlan:
    """Names and commands of one study.

    Args:
        recipe: Data, model, depths, steps and rates.
        data_steps: The steps that make the data.
        held_out: Name of the set that is measured.
        tuning: Name of the set that rates and references are chosen by.
    """

    def __init__(
        self,
        recipe: Recipe,
        data_steps: Sequence[Step],
        held_out: str = "held_out",
        tuning: str = "tuning",
    ):
        self.recipe, self.data_steps = recipe, list(data_steps)
        self.held_out, self.tuning = held_out, tuning
        self.depths = (*recipe.exit_depths, recipe.measured[-1])

    def extract_steps(self) -> list[Step]:
        """Return the steps that cut out the first layers, from which separate models start."""
        steps = []
        for depth in self.recipe.exit_depths:
            target = self._start_of(depth)
            command = (
                *(*OURS, "extract", str(self.recipe.model), str(target)),
                *f"--depth {depth} --overwrite --no-verify".split(),
            )
            steps.append(
                Step(
                    f"cut-{depth}",
                    f"Cut out the first {depth} layers",
                    command,
                    (target / "config.json",),
                    (),
                    self.recipe.data_steps,
                )
            )
        return steps

    def rate_steps(self) -> list[Step]:
        """Return short trainings that choose a rate: for nested models, and for each depth."""
        steps = [
            self._train(
                f"rate-nested-{rate}",
                self._nested_flags(()),
                self.recipe.model,
                rate,
                1,
                self.recipe.num_sweep_steps,
            )
            for rate in self._rates_to_try("nested")
        ]
        return steps + [
            self._train(
                f"rate-{depth}-{rate}",
                (),
                self._start_of(depth),
                rate,
                1,
                self.recipe.num_sweep_steps,
                self._needs_cut(depth),
            )
            for depth in self.depths
            for rate in self._rates_to_try("ordinary")
        ]

    def separate_steps(self, seed: int) -> list[Step]:
        """Return the separate training of a model for each depth."""
        return [
            self._train(
                f"separate-{depth}-{seed}",
                (),
                self._start_of(depth),
                self.rate(depth),
                seed,
                self.recipe.num_steps,
                self._needs_cut(depth),
            )
            for depth in self.depths
        ]

    def taught_steps(self, seed: int) -> list[Step]:
        """Return separate trainings with the separate model of full depth as teacher.

        They show which part of a taught nested model's gain is not due to nesting.
        """
        flags = ("--exit-kd-weight", "1", "--exit-kd-teacher", self._teachers(seed)["separate"])
        return [
            self._train(
                f"taught-{depth}-{seed}",
                flags,
                self._start_of(depth),
                self.rate(depth),
                seed,
                self.recipe.num_steps,
                (*self._needs_cut(depth), self._full_model(seed)),
            )
            for depth in self.depths
        ]

    def variant_step(self, variant: Variant, seed: int) -> Step:
        """Return the training of one variant.

        The separate models of the seed, and for references those of seed 1, come before it.
        """
        rate = f"{float(self.rate(None)) * variant.rate:.3g}"
        needs, flags, start = (), self._nested_flags(self.flags(variant, seed)), self.recipe.model
        if variant.needs_full_model:
            needs = (self._full_model(seed),)
        if variant.goes_on:
            start, flags = (
                Path(self._teachers(seed)["separate"]),
                (*flags, "--finetune", "--use-checkpoint-args"),
            )
        return self._train(
            f"nested-{variant.name}-{seed}",
            flags,
            start,
            rate,
            seed,
            self.recipe.num_steps * variant.steps,
            needs,
        )

    def flags(self, variant: Variant, seed: int) -> list[str]:
        """Return the flags in which a variant differs from uniform."""
        references = self.references() if variant.needs_references else {}
        return expand(
            variant,
            self.depths,
            references,
            self.recipe.num_steps * variant.steps,
            self._teachers(seed),
        )

    def rate(self, depth: int | None) -> str:
        """Return the rate of a separate model of this depth, or of nested training (None).

        Raises:
            DataError: A run that tries a rate left no evaluation.
        """
        name, kind = ("nested", "nested") if depth is None else (str(depth), "ordinary")
        rates = self._rates_to_try(kind)
        if not rates:
            return self.recipe.rates[kind][0]
        losses = {
            rate: trainer_losses(self._evaluation(f"rate-{name}-{rate}"), self.tuning)
            for rate in rates
        }
        return choose_rate(losses, self.depths if depth is None else (depth,))

    def references(self) -> dict[int, float]:
        """Return {depth: loss} of the separate models of seed 1 on the samples for tuning."""
        return {
            depth: trainer_losses(self._evaluation(f"separate-{depth}-1"), self.tuning)[depth]
            for depth in self.depths
        }

    def outcomes(
        self,
        variants: Sequence[Variant],
        seeds: int,
        name: str | None = None,
        with_taught: bool = False,
    ) -> Outcomes:
        """Return the losses of all trainings on the samples ``name``, by default held-out ones.

        Args:
            variants: Variants of the nested model.
            seeds: The number of seeds.
            name: Name of the samples.
            with_taught: Whether to include separate models that had a teacher.

        Raises:
            DataError: A training left no evaluation.
        """
        name = name or self.held_out
        kinds = ("separate", "taught") if with_taught else ("separate",)
        alone = {
            kind: [
                {
                    depth: trainer_losses(self._evaluation(f"{kind}-{depth}-{seed}"), name)[depth]
                    for depth in self.depths
                }
                for seed in range(1, seeds + 1)
            ]
            for kind in kinds
        }
        nested = {
            variant.name: [
                trainer_losses(self._evaluation(f"nested-{variant.name}-{seed}"), name)
                for seed in range(1, seeds + 1)
            ]
            for variant in variants
        }
        return Outcomes(alone["separate"], alone.get("taught", []), nested, UNIFORM)

    def gradients(self, seeds: int) -> dict[int, tuple[float, float, float]]:
        """Return {depth: (first cosine, last cosine, last ratio of norms)} of uniform training.

        They are means over seeds, of the first and last report. The gradient of each intermediate
        exit's own loss is compared with the one from all deeper exits.

        Raises:
            DataError: A training left no reports.
        """
        runs = [read_run(self._run(f"nested-{UNIFORM}-{seed}")) for seed in range(1, seeds + 1)]
        measured = {}
        for depth in self.recipe.exit_depths:
            cosines = [run.exit_curve(depth, "gradient_cosine").values for run in runs]
            ratios = [run.exit_curve(depth, "gradient_ratio").values for run in runs]
            measured[depth] = (
                fmean(one[0] for one in cosines),
                fmean(one[-1] for one in cosines),
                fmean(one[-1] for one in ratios),
            )
        return measured

    def _rates_to_try(self, kind: str) -> tuple[str, ...]:
        return self.recipe.rates[kind] if len(self.recipe.rates[kind]) > 1 else ()

    def _start_of(self, depth: int) -> Path:
        return (
            self.recipe.model
            if depth == self.depths[-1]
            else self.recipe.folder / "cut" / str(depth)
        )

    def _full_model(self, seed: int) -> str:
        return f"separate-{self.depths[-1]}-{seed}"

    def _teachers(self, seed: int) -> dict[str, str]:
        return {
            "start": str(self.recipe.model),
            "separate": str(self.recipe.folder / "runs" / self._full_model(seed)),
        }

    def _needs_cut(self, depth: int) -> tuple[str, ...]:
        return () if depth == self.depths[-1] else (f"cut-{depth}",)

    def _nested_flags(self, flags: Sequence[str]) -> tuple[str, ...]:
        return "--exit-layer-nums", *map(str, self.recipe.exit_depths), *flags

    def _run(self, name: str) -> Path:
        return ROOT / self.recipe.folder / "runs" / name

    def _evaluation(self, name: str) -> Path:
        return self._run(name) / "evaluation.json"

    def _train(
        self,
        name: str,
        flags: Sequence[str],
        start: Path,
        rate: str,
        seed: int,
        num_steps: int,
        needs: tuple[str, ...] = (),
    ) -> Step:
        recipe, save = self.recipe, self.recipe.folder / "runs" / name
        tokenizer = ("--tokenizer-model", str(recipe.model / "tokenizer.model"))
        command = (
            *train_command(recipe, start, tokenizer),
            "--valid-data-path",
            *(str(prefix(recipe.folder, each)) for each in (self.held_out, self.tuning)),
            *run_flags(recipe, num_steps, rate, seed, save),
            *flags,
        )
        return Step(
            name,
            f"{num_steps} steps at learning rate {rate}, seed {seed}",
            command,
            (save / "evaluation.json",),
            (save,),
            (*recipe.data_steps, *needs),
        )
