"""Chooses how to decode a model on this machine: measures what each exit says and costs, then takes the fastest options of every way.

    python tools/tune_decoding.py MODEL --prompt-file prompts.txt
    python tools/tune_decoding.py MODEL --questions questions.jsonl --least-same 0.99
    python tools/tune_decoding.py MODEL --prompt-file prompts.txt --draft SMALL

The full model writes on from some prompts; its exits read what it wrote (how often do they agree, how sure are they), and the machine's
seconds are measured by depth and by how many tokens are read at once. From both every setting's speed is forecast, the best of each way are
run, and what is fastest is kept beside the model in decoding.json, where tools/generate.py, serve.py and benchmark_decoding.py find it.
With --draft the exits are the other model's, its last layer among them; what is chosen then stands in decoding.json beside what was chosen
without, or with others, and counts where the same --draft is given.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import dataclasses
import platform
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from decoding.choices import CHOICES, config_sha256, draft_key, read_choices, write_choices
from decoding.options import add_model_options, check_positive, writer_of
from decoding.questions import add_prompt_options, read_prompts
from tqdm import tqdm

from megatron_sorted.decoding.costs import measure_costs
from megatron_sorted.decoding.generate import Limits, generate
from megatron_sorted.decoding.traces import record
from megatron_sorted.decoding.tuning import Tuner
from megatron_sorted.decoding.ways import SPECULATIVE, Full, Way, check_draft
from megatron_sorted.decoding.writer import Writer
from megatron_sorted.errors import SettingsError


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_prompt_options(parser, 16)
    parser.add_argument("--max-new-tokens", type=int, default=96, help="written for each prompt (%(default)s)")
    parser.add_argument("--least-same", type=float, default=0.99,
                        help="share of tokens that early_exit must have in common with the full model (%(default)s)")
    parser.add_argument("--output", type=Path, help=f"file to write (default: {CHOICES} in the model's directory)")
    return parser.parse_args(arguments)


def run_for_real(writer: Writer, way: Way, prompts: list[list[int]], limits: Limits) -> tuple[float, float]:
    """Returns tokens a second and tokens a step of a way."""
    draft = writer.draft_for(way)
    generate(writer.network, prompts[:1], way, limits=dataclasses.replace(limits, max_new_tokens=8), draft=draft)
    began, tokens, steps = time.perf_counter(), 0, 0
    for prompt in prompts:
        [text] = generate(writer.network, [prompt], way, limits=limits, draft=draft)
        tokens, steps = tokens + len(text.tokens), steps + text.counts.num_steps
    return tokens / (time.perf_counter() - began), tokens / steps


def depths_to_try(writer: Writer) -> list[int]:
    """Returns the exits that may draft: those before the model's last layer, or all of another model.

    Raises:
        SettingsError: There are none, or the other model cannot draft for this one.
    """
    if writer.draft is not None:
        check_draft(writer.draft, writer.network)
        return list(writer.draft.depths)
    depths = list(writer.network.depths[:-1])
    if not depths:
        raise SettingsError("the model has no exits before its last layer, so there is nothing to choose. Give --depths or --draft, "
                            "or train exits.")
    return depths


def measure(writer: Writer, depths: list[int], prompts: list[list[int]], limits: Limits) -> Tuner:
    """Returns what looks for the fastest options, by what the exits say and what reading costs here."""
    network, draft = writer.network, writer.draft
    traces = [trace for prompt in tqdm(prompts, "recording what exits say", unit="text")
              for trace in record(network, [prompt], depths, limits=limits, drafter=draft)]
    print("measuring what reading costs ...", flush=True)
    costs = measure_costs(network, [network.num_layers] if draft else [*depths, network.num_layers])
    return Tuner(traces, depths, costs, network.num_layers, measure_costs(draft, depths) if draft else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, chooses, tries and writes."""
    values = read_arguments(arguments)
    check_positive(values, "max_new_tokens", "num_prompts")
    path = values.output or values.model / CHOICES
    read_choices(path)  # what is damaged is told before anything is measured
    writer = writer_of(values)
    print(writer.form.line, flush=True)
    draft, depths = writer.draft, depths_to_try(writer)
    prompts = read_prompts(values, writer)
    limits = Limits(values.max_new_tokens, writer.end_ids)
    whose = f"{values.draft.resolve().name}, which drafts for {writer.network.num_layers}" if draft else str(writer.network.num_layers)
    print(f"{len(prompts)} prompts, exits {', '.join(map(str, depths))} of {whose} layers", flush=True)
    tuner = measure(writer, depths, prompts, limits)
    print("looking for the fastest options ...", flush=True)
    choices = {"full": Full(), "self_speculative": tuner.self_speculative().way, "sorted_speculative": tuner.sorted_speculative().way}
    early = None if draft else tuner.early_exit(values.least_same)
    if early is not None:
        choices["early_exit"] = early.way
    speeds = {name: run_for_real(writer, way, prompts, limits) for name, way in tqdm(choices.items(), "trying them", unit="way")}
    trees = {tree: run_for_real(writer, tree, prompts[:4], limits) for tree in tqdm(tuner.trees(), "trying trees", unit="tree")}
    choices["tree"] = max(trees, key=lambda tree: trees[tree][0])
    speeds["tree"] = run_for_real(writer, choices["tree"], prompts, limits)
    print(f"\n{'way':20} {'tokens/s':>9} {'speed-up':>9} {'tokens/step':>12}  options")
    for name, way in choices.items():
        options = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(way).items())
        print(f"{name:20} {speeds[name][0]:9.1f} {speeds[name][0] / speeds['full'][0]:8.2f}x {speeds[name][1]:12.2f}  {options}")
    fit = {name: way for name, way in choices.items() if draft is None or isinstance(way, SPECULATIVE)}
    best = max((name for name in fit if name != "early_exit"), key=lambda name: speeds[name][0])
    machine = {"device": values.device, "dtype": values.dtype, "threads": torch.get_num_threads(), "processor": platform.processor()}
    found = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine,
             "best": best, "ways": {name: dataclasses.asdict(way) for name, way in fit.items()},
             "tokens_per_second": {name: round(speed, 2) for name, (speed, _) in speeds.items()},
             "agreement": {str(depth): round(sum(sum(trace.same_dn[index]) for trace in tuner.traces)
                                             / sum(len(trace.tokens) for trace in tuner.traces), 4) for index, depth in enumerate(depths)},
             "costs": dataclasses.asdict(tuner.costs)}
    if draft is None:
        write_choices(path, found)
    else:
        found = {"name": values.draft.resolve().name, "config_sha256": config_sha256(draft), **found,
                 "draft_costs": dataclasses.asdict(tuner.drafting)}
        write_choices(path, found, draft_key(values.draft, draft))
    slow = draft and speeds[best][0] <= speeds["full"][0]
    print(f"\nfastest without a difference: {best}{'; without --draft, full is faster here' if slow else ''}; written: {path}")


if __name__ == "__main__":
    run_main(main, "Nothing was written.")
