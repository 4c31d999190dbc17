"""Greedy texts are vLLM's own, token for token in fp32, and drafts are those of the exits."""

import random

import pytest

from megatron_sorted.serving.vllm.options import EngineOptions
from tests.vllm.engine import engine, frozen, generate, plain_texts, runner_of
from tests.vllm.models import expected_counts, prompts, write_model

SELF = [EngineOptions("self_speculative", (depth,)) for depth in (1, 2, 3)]
SORTED = [
    EngineOptions("sorted_speculative", (1, 3), (0.5, 0.2), num_draft_tokens=6),
    EngineOptions("sorted_speculative", (1, 2, 3), (0.3, 0.4, 0.1), num_draft_tokens=5),
    EngineOptions("sorted_speculative", (2,), (0.3,), "margin", num_draft_tokens=8),
]
ALL = [*SELF, *SORTED]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


def check(directory, options, count=20, most=32, **more):
    """Check texts against vLLM's own, and that drafts were accepted; return the counts."""
    some = prompts(count)
    with engine(directory, options, **more) as (llm, counts):
        texts = generate(llm, some, most)
    assert texts == plain_texts(directory, frozen(some), most)
    assert 0 < counts.accepted < counts.drafted
    return counts


def check_by_hand(directory, options, count=8, most=16):
    """Check texts against vLLM's own, and what is drafted and accepted against transformers."""
    some = prompts(count)
    with engine(directory, options) as (llm, counts):
        texts = generate(llm, some, most)
    longer = plain_texts(directory, frozen(some), most + options.num_draft_tokens + 1)
    assert texts == [text[:most] for text in longer]
    by_hand = [
        expected_counts(directory, prompt, text, options, most)
        for prompt, text in zip(some, longer, strict=True)
    ]
    drafted, accepted = (sum(column) for column in zip(*by_hand, strict=True))
    assert (counts.drafted, counts.accepted) == (drafted, accepted)
    assert 0 < accepted < drafted
    return counts


@pytest.mark.parametrize("options", ALL, ids=str)
def test_texts_are_those_of_vllm_and_drafts_those_of_transformers(llama, options):
    counts = check_by_hand(llama, options)
    if options.strategy == "sorted_speculative":
        assert len({*counts.lengths}) > 1, "drafts of one length only"


@pytest.mark.parametrize("options", [SELF[1], SORTED[0]], ids=str)
@pytest.mark.parametrize("at_once", [1, 3, 32])
def test_any_number_of_requests_at_once(llama, options, at_once):
    check(llama, options, 33 if at_once == 32 else 6, max_num_seqs=at_once)


@pytest.mark.parametrize("options", [SELF[0], SORTED[1]], ids=str)
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family(tmp_path, family, options):
    check(write_model(tmp_path / family, family), options)


@pytest.mark.parametrize(
    ("family", "own", "options"),
    [
        ("llama", ("norm",), SELF[1]),
        ("llama", ("norm", "lm_head"), SORTED[0]),
        ("qwen2", ("norm", "lm_head"), SELF[1]),
        ("llama", ("norm", "lm_head", "adapter", "mlp"), SELF[1]),
        ("qwen3", ("adapter", "mlp"), SORTED[0]),
    ],
)
def test_exits_with_parts_of_their_own_draft_what_transformers_drafts(
    tmp_path, family, own, options
):
    check_by_hand(write_model(tmp_path / "model", family, own), options, count=5)


@pytest.mark.parametrize("options", [SELF[1], SORTED[0]], ids=str)
def test_chunked_prefill_and_kept_prefixes(llama, options):
    beginning = prompts(1, 200, seed=4)[0] * 9
    some = [beginning[:150] + one for one in prompts(12)]
    plain = plain_texts(llama, frozen(some))
    for more in (
        {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "max_num_seqs": 6},
        {"enable_prefix_caching": True, "block_size": 32},
    ):
        with engine(llama, options, **more) as (llm, counts):
            assert generate(llm, some) == plain
            assert generate(llm, some[::-1]) == plain[::-1]
        assert counts.accepted


@pytest.mark.parametrize("options", [SELF[1], SORTED[0]], ids=str)
def test_preempted_requests(llama, options):
    """24 texts of up to 168 tokens in a cache of 20 blocks of 32 tokens."""
    some, most = prompts(24), 128
    with engine(llama, options, max_num_seqs=24, num_gpu_blocks_override=20, block_size=32) as (
        llm,
        counts,
    ):
        texts = generate(llm, some, most)
        preempted = sum(
            metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
        )
    assert texts == plain_texts(llama, frozen(some), most)
    assert preempted and counts.accepted


@pytest.mark.parametrize("options", [SELF[1], SORTED[0]], ids=str)
def test_stop_strings_and_limits(llama, options):
    from vllm import SamplingParams

    some = prompts(12)
    plain = plain_texts(llama, frozen(some))
    stops = [f"w{text[length]}" for length, text in enumerate(plain, start=3)]
    requests = [{"prompt_token_ids": prompt} for prompt in some]
    parameters = [
        SamplingParams(temperature=0, max_tokens=20 + row, stop=[stop], ignore_eos=True)
        for row, stop in enumerate(stops)
    ]
    results = []
    for one in (EngineOptions(), options):
        with engine(llama, one) as (llm, _):
            outputs = llm.generate(requests, parameters, use_tqdm=False)
            results.append([(row.outputs[0].text, row.outputs[0].finish_reason) for row in outputs])
    assert results[0] == results[1]
    assert {reason for _, reason in results[0]} >= {"stop"}


@pytest.mark.parametrize("options", [SELF[1], SORTED[0]], ids=str)
def test_requests_that_come_and_go(llama, options):
    from vllm import SamplingParams

    some, chance = prompts(24), random.Random(1)
    plain, texts = plain_texts(llama, frozen(some)), {}
    with engine(llama, options, max_num_seqs=6) as (llm, counts):
        waiting, dropped = list(range(len(some))), {5, 11, 17}
        steps = 0
        while waiting or llm.llm_engine.has_unfinished_requests():
            for number in [waiting.pop(0) for _ in range(chance.randint(0, 2)) if waiting]:
                llm.llm_engine.add_request(
                    str(number),
                    {"prompt_token_ids": some[number]},
                    SamplingParams(temperature=0, max_tokens=32, ignore_eos=True),
                )
            steps += 1
            if steps in (9, 15, 21):
                aborted = sorted(dropped)[steps // 6 - 1]
                llm.llm_engine.abort_request([str(aborted)])
            for output in llm.llm_engine.step():
                if output.finished:
                    texts[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
    for number, text in texts.items():
        if number not in dropped:
            assert text == plain[number]
    assert len(texts) >= len(some) - len(dropped) and counts.accepted


def test_a_schedule_of_draft_lengths(llama):
    """Four tokens are drafted for one text, one for each of two, none for three."""
    from vllm import SamplingParams

    schedule = ((1, 1, 4), (2, 2, 1), (3, 32, 0))
    options = EngineOptions("self_speculative", (2,), draft_schedule=schedule)
    some, limits = prompts(3), (8, 20, 32)
    parameters = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in limits]
    with engine(llama, options) as (llm, counts):
        outputs = llm.generate(
            [{"prompt_token_ids": one} for one in some], parameters, use_tqdm=False
        )
    plain = plain_texts(llama, frozen(some))
    assert [list(one.outputs[0].token_ids) for one in outputs] == [
        text[:limit] for text, limit in zip(plain, limits, strict=True)
    ]
    assert {*counts.lengths} == {1, 4} and counts.accepted


@pytest.mark.parametrize("options", [SELF[1], SORTED[0]], ids=str)
def test_texts_near_the_longest_length(llama, options):
    check(llama, options, count=6, most=200, max_model_len=200 + 41)


@pytest.mark.parametrize("options", [SELF[1], SORTED[0]], ids=str)
def test_two_ranks_of_tensor_parallelism(llama, options):
    check(llama, options, count=8, most=16, tensor_parallel_size=2)


def test_the_compiled_model(llama):
    """Without enforce_eager vLLM compiles the target; what drafts runs its layers one by one."""
    some = prompts(6)
    with engine(llama, enforce_eager=False) as (llm, _):
        plain = generate(llm, some)
    for options in (SELF[1], SORTED[0]):
        with engine(llama, options, enforce_eager=False) as (llm, counts):
            assert generate(llm, some) == plain
        assert counts.accepted


def test_nothing_is_held_twice(llama):
    """Parameters and cache are those of vLLM without the plug-in, byte for byte."""
    sizes = []
    for options in (EngineOptions(), SELF[1], SORTED[1]):
        with engine(llama, options) as (llm, _):
            runner = runner_of(llm)
            modules = [runner.model]
            if options.drafts:
                modules += runner.drafter.segments
            storages = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for module in modules
                for tensor in [*module.parameters(), *module.buffers()]
            }
            caches = [tensor.untyped_storage().nbytes() for tensor in runner.kv_caches]
            blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            sizes.append((sum(storages.values()), len(caches), sum(caches), blocks))
    assert sizes[0] == sizes[1] == sizes[2]
