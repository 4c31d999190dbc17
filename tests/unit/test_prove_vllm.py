"""The proof of vLLM's plug-in, with transformers in vLLM's place: what it compares is compared
rightly, and every kind of difference is reported.
"""

import random
import re
from types import SimpleNamespace

import pytest
import torch

from lab.contests.rounds import Store
from lab.vllm_proof.factors import ABORTED_AT, BASE, factors, jobs
from lab.vllm_proof.ours import later_pairs_expected, our_events
from lab.vllm_proof.page import page
from lab.vllm_proof.parts import MEMORY, PLUG_IN, SAMPLING, STOCK, Proof
from lab.vllm_proof.worker import Watch
from megatron_sorted.conversion.hugging_face.nested_exits import load_nested_exits
from megatron_sorted.decoding.network import load_network
from megatron_sorted.serving.vllm.options import EngineOptions
from tests.support.model_directories import save_model

DEPTHS = (1, 2, 3, 4)
SETTINGS = {"model": "tiny", "vllm": "0", "threads": 1, "tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the directory of a tiny nested model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory, "llama", True, exit_layer_indices=list(DEPTHS))
    return directory


def greedy(exits, prompt, count, depth=None):
    """Return the tokens that an exit of transformers' model adds."""
    tokens = torch.tensor([prompt])
    return exits.generate(tokens, depth, count)[0, len(prompt) :].tolist()


def verifications(exits, prompt, text, depth, length):
    """Return [drafted, accepted] of each verification, one exit's drafts after another.

    They begin after the first token and end when the text is complete.
    """
    events, written = [], 1
    while written < len(text):
        draft = greedy(exits, [*prompt, *text[:written]], length, depth)
        own = greedy(exits, [*prompt, *text[:written]], length)
        accepted = next((at for at in range(length) if draft[at] != own[at]), length)
        events.append([length, accepted])
        written += accepted + 1
    return events


class StandIn:
    """Transformers in the place of vLLM's Python; ``change`` may spoil an answer."""

    def __init__(self, model, change=lambda job, answer: None):
        self.exits, self.change = load_nested_exits(model), change

    def ask(self, job):
        """Return the answer to a job, as vLLM's Python would."""
        count, config = job["sampling"]["max_tokens"], job["engine"].get("additional_config")
        texts = [greedy(self.exits, prompt, count) for prompt in job["prompts"]]
        events = [[] for _ in texts]
        if config is not None:
            options = config["megatron_sorted"]
            [depth], length = options["depths"], options["num_draft_tokens"]
            events = [
                verifications(self.exits, prompt, text, depth, length)
                for prompt, text in zip(job["prompts"], texts, strict=True)
            ]
        answer = {
            "texts": texts, "strings": ["" for _ in texts], "ends": ["length" for _ in texts],
            "events": events, "cached": 0, "preempted": 0, "partial": 0, "most_running": 8,
            "steps": 3, "seconds": 1.0, "cpu_seconds": 1.0, "start_seconds": 1.0,
        }  # fmt: skip
        self.change(job, answer)
        return answer


def proof_of(model, tmp_path, change=lambda job, answer: None):
    """Return the proof of the tiny model, with three prompts of the base setting."""
    chance = random.Random(0)
    prompts = [[chance.randrange(100) for _ in range(5)] for _ in range(3)]
    store = Store(tmp_path / "vllm_proof.json", SETTINGS)
    return Proof(model, store, StandIn(model, change), prompts, 2, 12)


@pytest.mark.parametrize(("depth", "length"), [(1, 3), (3, 4)])
def test_our_decoder_s_drafts_are_those_that_transformers_exits_would_make(model, depth, length):
    network = load_network(model, native="off")
    exits, prompts = load_nested_exits(model), [[5, 6, 7], [9, 2], [40, 41, 42, 43]]
    texts = [greedy(exits, prompt, 14) for prompt in prompts]
    expected = [
        verifications(exits, prompt, text, depth, length)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    options = EngineOptions("self_speculative", (depth,), num_draft_tokens=length)
    assert [
        list(map(list, one)) for one in our_events(network, prompts, texts, options)
    ] == expected
    assert {accepted for one in expected for _, accepted in one} != {0}  # some are accepted


@torch.no_grad()
def test_probabilities_of_later_pairs_sum_over_the_first_token(model):
    base, prompt, top_k = load_nested_exits(model).base, [3, 4], 3
    expected = {}

    def likeliest(tokens):
        logits = base(torch.tensor([tokens])).logits[0, -1] / 0.7
        values, places = logits.topk(top_k)
        return zip(places.tolist(), values.softmax(-1).tolist(), strict=True)

    for first, one in likeliest(prompt):
        for second, two in likeliest([*prompt, first]):
            for third, three in likeliest([*prompt, first, second]):
                pair = second, third
                expected[pair] = expected.get(pair, 0) + one * two * three
    computed = later_pairs_expected(model, prompt, 0.7, top_k)
    assert computed == pytest.approx(expected, abs=1e-6) and sum(
        computed.values()
    ) == pytest.approx(1)


def test_equal_texts_and_drafts_pass_and_the_same_command_continues(model, tmp_path):
    proof = proof_of(model, tmp_path)
    proof.compare_texts([BASE], lambda: None)
    assert proof.wrong() == []
    rows = proof.store.rows
    assert [row["tokens"] for row in rows] == [12] * 3 and all(row["as_ours"] for row in rows)
    proof.process = None  # nothing is asked again
    proof.compare_texts([BASE], lambda: None)
    assert Store(tmp_path / "vllm_proof.json", SETTINGS).rows == rows
    text = page(rows, proof.store.facts, SETTINGS, "command")
    assert "| base | 36 | 3 of 3 |" in text and "| 3 of 3 | 8 |" in text


def spoil(name):
    """Return a change of the plug-in's answers: a token, a draft, all drafts, or nothing."""

    def change(job, answer):
        if "additional_config" not in job["engine"]:
            return
        if name == "token":
            answer["texts"][1][7] = (answer["texts"][1][7] + 1) % 100
        if name == "draft":
            answer["events"][2][0][1] += 1
        if name == "none accepted":
            answer["events"] = [[[4, 0]] for _ in answer["events"]]

    return change


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("token", r"base: prompts \[1\]: the texts differ"),
        ("draft", r"base: prompts \[2\]: drafts differ from ours"),
        ("none accepted", "base: no draft was accepted"),
    ],
)
def test_a_difference_is_reported(name, line, model, tmp_path):
    proof = proof_of(model, tmp_path, spoil(name))
    proof.compare_texts([BASE], lambda: None)
    assert any(re.match(line, one) for one in proof.wrong()), proof.wrong()
    if name == "token":
        row = proof.store.rows[1]
        assert row["place"] == 7 and row["margin"] > 0


def test_a_factor_that_never_happened_is_reported(model, tmp_path):
    proof = proof_of(model, tmp_path)
    proof.compare_texts(["preemption"], lambda: None)
    assert proof.wrong() == ["preemption: it never happened (preempted is 0)"]
    proof.few = 3
    proof.compare_texts(["preemption"], lambda: None)
    assert [row["prompt"] for row in proof.store.rows] == [0, 1, 2]  # the fewer are replaced


def test_of_requests_that_are_ended_the_beginning_is_compared(model, tmp_path):
    def end(job, answer):
        drafts = "additional_config" in job["engine"]
        answer["texts"] = [text[: ABORTED_AT + drafts] for text in answer["texts"]]
        answer["ends"][1] = "abort"

    proof = proof_of(model, tmp_path, end)
    proof.num_tokens = ABORTED_AT + 2
    proof.compare_texts(["requests that come and go"], lambda: None)
    rows = proof.store.rows
    assert rows[1]["place"] is None and rows[1]["tokens"] == ABORTED_AT
    assert rows[0]["place"] == ABORTED_AT  # it was not to be ended


def test_both_engines_of_a_factor_differ_by_the_plug_in_alone(model):
    for factor in factors(DEPTHS, 1024):
        both = jobs(factor, model, [[1, 2]], 8)
        plain, other = both["plain"]["engine"], both["other"]["engine"]
        assert {key: one for key, one in both["plain"].items() if key != "engine"} == {
            key: one for key, one in both["other"].items() if key != "engine"
        }
        if factor.options is not None:
            added = {"worker_cls", "additional_config", "speculative_config", "async_scheduling"}
            assert set(other) - set(plain) <= added and plain.items() <= other.items()


def test_samples_and_bytes_are_on_the_page(model, tmp_path):
    proof = proof_of(model, tmp_path)
    rows = [
        {
            "match": SAMPLING, "name": name, "samples": 100, "pairs": 9, "cells": 9,
            "impossible": impossible, "chi_square": None if impossible else 8.0, "p": p,
            "drafted": 200, "accepted": 100,
        }
        for name, impossible, p in ((PLUG_IN, 0, 0.4), (STOCK, 7, 0.0))
    ]  # fmt: skip
    memory = {
        "match": MEMORY, "name": PLUG_IN, "weights": 1000, "keys_and_values": 2000,
        "cached_layers": 4, "blocks": 10, "living": 3100,
    }  # fmt: skip
    proof.store.add([*rows, memory])
    assert proof.wrong() == []  # the fault is vLLM's own
    text = page(proof.store.rows, proof.store.facts, SETTINGS, "command")
    assert "vllm issue 55005" in text and "| 1,000 | 2,000 | 4 |" in text
    proof.store.rows[0]["p"] = 1e-5
    assert proof.wrong() == [f"{PLUG_IN}: samples do not fit, p 1e-05"]


def test_the_watch_sees_verifications_preemptions_and_parts_of_prompts():
    request = SimpleNamespace(num_computed_tokens=3, num_prompt_tokens=8)
    scheduler = SimpleNamespace(
        make_spec_decoding_stats=lambda stats, **more: stats, requests={"r0": request},
        _preempt_request=lambda request, time: None,
        schedule=lambda: SimpleNamespace(num_scheduled_tokens={"r0": 3}),
    )  # fmt: skip
    watch = Watch(scheduler)
    scheduler.schedule()
    request.num_computed_tokens = 8
    scheduler.schedule()
    scheduler._preempt_request(request, 0.0)
    assert (
        scheduler.make_spec_decoding_stats(
            "stats", num_draft_tokens=4, num_accepted_tokens=2, request_id="r0"
        )
        == "stats"
    )
    assert watch.events == {"r0": [(4, 2)]} and watch.num_preempted == 1
    assert (watch.num_partial, watch.num_steps, watch.most_running) == (1, 2, 1)
