"""The server's page in a real browser: what it shows is what the API answers, and no more loads."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
from safetensors.torch import load_file, save_file

from tests.support.browser import (
    CONTROL_ENTER,
    END,
    ESCAPE,
    RIGHT,
    Browser,
    browsing,
    needs_browser,
)
from tests.support.evaluated import write_model
from tests.system.test_server import serving

pytest.importorskip("uvicorn", reason="serving is an extra")
pytestmark = needs_browser
KEY = "0123456789abcdef"
LENGTH = 2048
SPANS = (
    "return [...document.querySelectorAll('#texts article:last-of-type [data-depth]')]"
    ".map((one) => [one.textContent, Number(one.dataset.depth), one.title])"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    model = write_model(
        folder / "tiny", seed=1, num_layers=4, max_position_embeddings=LENGTH, tied=False
    )
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][2] = 0  # the end token is never the likeliest
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (folder / "keys").write_text(KEY)
    (folder / "keys").chmod(0o600)
    # torch is slow enough to be stopped, and drafts also where that does not pay
    options = "--native", "off", "--api-key-file", folder / "keys", "--no-request-log"
    with serving(model, *options) as (_, port):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        browser.open("about:blank")  # its first page is one of its own
        yield browser


@pytest.fixture
def page(address, opened) -> Iterator[Browser]:
    """Return the browser; afterwards nothing may have been loaded from elsewhere, or failed."""
    opened.log("browser"), opened.log("performance")
    yield opened
    logged = [one for one in opened.log("browser") if one["source"] != "network"]
    assert logged == [], "but for statuses of answers the console is empty"
    messages = [json.loads(one["message"])["message"] for one in opened.log("performance")]
    requested = {
        one["params"]["request"]["url"]
        for one in messages
        if one["method"] == "Network.requestWillBeSent"
    }
    assert requested and not [url for url in requested if not url.startswith((address, "data:"))]


def ask(address: str, path: str, **body: object) -> list[dict]:
    """Return the events of a stream, or [the error]."""
    options = {"stream": True, "stream_options": {"include_usage": True, "include_depths": True}}
    request = urllib.request.Request(
        f"{address}v1/{path}",
        json.dumps({**body, **options}).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {KEY}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = answer.read().decode().split("\n\n")
    except urllib.error.HTTPError as error:
        return [json.load(error)]
    return [json.loads(line[6:]) for line in lines if line and "[DONE]" not in line]


def parts_of(events: list[dict]) -> list[list]:
    """Return the texts and depths of tokens, as the page titles them."""
    parts = [
        part for one in events for choice in one["choices"] for part in choice.get("parts", ())
    ]
    return [[text, depth, f"depth {depth} of 4"] for text, depth in parts if text]


def open_page(browser: Browser, address: str, **parameters: object) -> None:
    """Open the page with these parameters, and give it the key that it lacks."""
    browser.open(f"{address}?{urlencode(parameters)}")
    browser.until("document.querySelector('#error').textContent")
    browser.type("[name=key]", f"{KEY}\t")
    browser.until("model")


def ended(browser: Browser) -> str:
    """Return the status of the text when it has ended."""
    browser.until("!running && $('status').textContent")
    return browser.run("return $('status').textContent")


def cells(browser: Browser) -> dict[str, str]:
    """Return the measures by name."""
    return browser.run(
        "return Object.fromEntries([...document.querySelectorAll('dt')]"
        ".map((one) => [one.textContent, one.nextSibling.textContent]))"
    )


def test_a_depth_is_chosen_with_the_slider_and_its_text_is_that_of_the_api(page, address):
    open_page(page, address, mode="completion")
    assert page.run("return $('model').textContent") == "tiny: 4 layers, exits at 1, 2, 4"
    page.type("[name=prompt]", "Once upon a time")
    page.type("[name=max_tokens]", 24)
    page.type("[name=exit]", RIGHT, clear=False)
    assert page.run("return [fields.how.value, $('depth').textContent]") == [
        "fixed",
        "2 of 4 layers",
    ]
    page.click("#write")
    assert ended(page) == "Complete. 24 tokens."
    events = ask(
        address, "completions", prompt="Once upon a time", max_tokens=24, temperature=0, depth=2
    )
    spans = page.run(SPANS)
    assert spans == parts_of(events) and {depth for _, depth, _ in spans} == {2}
    assert page.run(
        "return $('texts').lastElementChild.textContent"
    ) == "Once upon a time" + "".join(text for text, *_ in spans)
    usage, shown = events[-1]["usage"], cells(page)
    prompt = usage["prompt_tokens"]
    assert shown["Tokens"] == "24" and float(shown["Tokens a second"]) > 0
    assert shown["Layers run"] == f"{2 * (prompt + 23)} of {4 * (prompt + 23)}"
    assert shown["Layers saved"] == "50 %" and shown["Drafts accepted"] == "none drafted"
    assert shown["Prompt tokens"] == f"{prompt}, 0 kept"


@pytest.mark.parametrize(
    "strategy", [{"how": "early_exit", "confidence": 0.3}, {"how": "self_speculative"}], ids=str
)
def test_a_link_fills_the_page_and_tokens_show_their_own_depths(page, address, strategy):
    request = {"prompt": "The cat", "max_tokens": 40, "temperature": 0.9, "seed": 5}
    open_page(page, address, mode="completion", run="", **strategy, **request)
    assert ended(page) == "Complete. 40 tokens."
    if "confidence" in strategy:
        events = ask(address, "completions", confidence=0.3, **request)
    else:
        events = ask(address, "completions", strategy="self_speculative", **request)
    spans = page.run(SPANS)
    assert spans == parts_of(events) and len({depth for _, depth, _ in spans}) > 1
    counts = page.run("return [...$('depths').rows].map((one) => one.innerText.split(/\\s+/))")
    depths = events[-1]["usage"]["depths"]
    assert counts == [["depth", str(one), str(depths.get(str(one), 0))] for one in (1, 2, 4)]
    details = events[-1]["usage"]["completion_tokens_details"]
    drafted = sum(details.values())
    assert cells(page)["Drafts accepted"] == (
        f"{details['accepted_prediction_tokens']} of {drafted}" if drafted else "none drafted"
    )


def test_a_conversation_goes_on_with_its_earlier_turns(page, address):
    open_page(page, address, how="full", max_tokens=12)
    turns = []
    for prompt in ("A bird flew", "Then it was"):
        page.type("[name=prompt]", prompt + CONTROL_ENTER)
        assert ended(page) == "Complete. 12 tokens."
        turns.append({"role": "user", "content": prompt})
        events = ask(
            address,
            "chat/completions",
            messages=turns,
            max_tokens=12,
            temperature=0,
            strategy="full",
        )
        assert page.run(SPANS) == parts_of(events)
        content = "".join(
            one["choices"][0]["delta"].get("content", "") for one in events if one["choices"]
        )
        turns.append({"role": "assistant", "content": content})
        assert page.run("return fields.prompt.value") == ""
    assert page.run("return turns") == turns
    page.click("#clear")
    assert page.run("return [turns, $('texts').innerText.slice(0, 10)]") == [[], "The colour"]


def test_stop_ends_the_text_here_and_in_the_server(page, address):
    def cancelled() -> int:
        with urllib.request.urlopen(f"{address}metrics", timeout=60) as answer:
            metrics = answer.read().decode()
        name = "megatron_sorted_requests_cancelled_total"
        return int(float(re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE)[1]))

    before = cancelled()
    open_page(page, address, prompt="a", mode="completion", how="full", max_tokens=LENGTH, run="")
    for end in (lambda: page.click("#stop"), lambda: page.type("[name=seed]", ESCAPE)):
        page.until("document.querySelectorAll('[data-depth]').length > 3")
        end()
        stopped = re.fullmatch(r"Stopped\. (\d+) tokens\.", ended(page))
        assert stopped and 3 < int(stopped[1]) < LENGTH - 100
        page.click("#clear")
        page.click("#write")
    page.click("#stop")
    ended(page)

    for _ in range(100):
        if cancelled() == before + 3:
            break
        ask(address, "completions", prompt="a", max_tokens=8)
    assert cancelled() == before + 3


def test_errors_are_shown_as_the_server_writes_them(page, address):
    page.open(f"{address}?prompt=a&mode=completion")
    page.until("$('error').textContent")
    assert page.run("return $('error').textContent").startswith("a key is needed. ")
    assert not page.run("return $('write').disabled ? '' : 'can write'")
    page.type("[name=key]", f"{KEY}\t")
    page.until("model && !$('error').textContent")
    page.type("[name=temperature]", "9")
    page.click("#write")
    assert ended(page) == "Failed. 0 tokens."
    answer = ask(address, "completions", prompt="a", temperature=9)
    assert page.run("return $('error').textContent") == answer[0]["error"]["message"]
    page.type("[name=temperature]", "1")
    page.type("[name=max_tokens]", "3")
    page.click("#write")
    page.until("$('status').textContent === 'Complete. 3 tokens.' && !$('error').textContent")


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [
        ("data: [DONE]\n\n", "Complete. 2 tokens.", ""),
        ('data: {"error": {"message": "it stops"}}\n\n', "Failed. 2 tokens.", "it stops"),
        ("data: ", "Failed. 2 tokens.", "The connection ended before the text did."),
    ],
    ids=["whole", "error", "early end"],
)
def test_a_stream_comes_in_any_pieces_and_may_fail(page, address, end, status, error):
    open_page(page, address, prompt="a", mode="completion")
    events = [
        {"choices": [{"parts": [[text, depth]]}]} for text, depth in (("猫\n\n", 1), ("b", 4))
    ]
    stream = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    page.run(
        """
        const bytes = new TextEncoder().encode(arguments[0]);
        window.fetch = async () => new Response(new ReadableStream({
          start(controller) {
            for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
            controller.close();
          },
        }));
        """,
        stream + end,
    )
    page.click("#write")
    assert ended(page) == status
    assert page.run("return $('error').textContent") == error
    assert page.run(SPANS) == [["猫\n\n", 1, "depth 1 of 4"], ["b", 4, "depth 4 of 4"]]
    assert page.run("return [$('write').disabled, $('stop').disabled]") == [False, True]


def test_every_control_has_a_name_and_a_phone_needs_no_sideways_scrolling(page, address):
    open_page(page, address)
    names = [
        page.send(f"{page.find(f'[name={name}]')}/computedlabel", "GET")
        for name in page.run("return [...fields].map((one) => one.name).filter(Boolean)")
    ]
    assert len(names) > 8 and all(names)
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.emulate("setDeviceMetricsOverride", **size)
    try:
        page.until("innerWidth === 360")
        assert page.run("return document.documentElement.scrollWidth") <= 360
    finally:
        page.emulate("clearDeviceMetricsOverride")


@pytest.mark.parametrize("exits", [2, 3, 8, 32])
def test_colours_are_in_order_of_lightness_and_readable(page, address, exits):
    open_page(page, address)
    pairs = page.run(
        """
        model = {...model, exits: [...Array(arguments[0]).keys()].map((one) => 1 + one)};
        const options = {willReadFrequently: true};
        const canvas = document.createElement("canvas").getContext("2d", options);
        return model.exits.map((depth) => coloursOf(depth).map((colour) => {
          canvas.fillStyle = colour;
          canvas.fillRect(0, 0, 1, 1);
          return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }));
        """,
        exits,
    )

    def luminance(colour: list[int]) -> float:  # as WCAG 2 defines it
        linear = [
            one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4
            for one in (value / 255 for value in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    shades = [tuple(map(luminance, pair)) for pair in pairs]
    backgrounds = [background for background, _ in shades]
    assert backgrounds == sorted(backgrounds, reverse=True) and len(set(backgrounds)) == exits
    for shade in shades:
        assert (max(shade) + 0.05) / (min(shade) + 0.05) >= 4.5


def test_the_last_exit_is_the_whole_model(page, address):
    open_page(page, address)
    page.type("[name=exit]", END, clear=False)
    assert page.run("return [$('depth').textContent, chosenDepth()]") == ["4 of 4 layers", 4]
