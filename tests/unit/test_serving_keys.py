"""API keys: files and variables are read or refused, /v1 needs a key, and none is ever shown."""

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from fastapi.testclient import TestClient

from megatron_sorted.decoding.strategies import Full
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.errors import SettingsError
from megatron_sorted.serving.answers import RefusedError
from megatron_sorted.serving.api import make_app
from megatron_sorted.serving.keys import KEY_VARIABLE, ApiKeys, open_keys
from megatron_sorted.serving.worker import GenerationWorker
from tests.support.decoding import plain_network
from tests.unit.test_decoding_server import NamedLetters

FIRST, SECOND, THIRD = "first-key-0123456789", "second-key-0123456789", "third-key-0123456789"


def key_file(tmp_path, text: str, mode: int = 0o600):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def served():
    """Return a client of a server with two keys, and the jobs that its worker has."""
    worker, jobs = GenerationWorker(TextGenerator(plain_network()[1], NamedLetters())), []
    submit = worker.submit
    worker.submit = lambda job: (jobs.append(job), submit(job))[1]
    keys = ApiKeys([f"alice {FIRST}", SECOND], "keys")
    with TestClient(make_app(worker, "tiny", lambda _: Full(), keys=keys)) as client:
        yield client, jobs
    worker.close()


def test_a_file_holds_keys_names_and_comments(tmp_path, capsys):
    path = key_file(tmp_path, f"# ours\n\nalice {FIRST}\n  {SECOND}  # no name\nalice {THIRD}\n")
    keys = open_keys(path, {})
    assert [keys.owner(f"Bearer {key}") for key in (FIRST, SECOND, THIRD)] == [
        "alice",
        "2",
        "alice",
    ]
    assert len(keys) == 3 and capsys.readouterr().err == ""
    assert FIRST not in repr(vars(keys))


def test_the_environment_holds_keys():
    keys = open_keys(None, {KEY_VARIABLE: f"{FIRST}, bob {SECOND}"})
    assert [keys.owner(f"bearer  {key}") for key in (FIRST, SECOND)] == ["1", "bob"]
    without = open_keys(None, {})
    assert not without and without.owner(None) == without.owner("Bearer x") == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it holds no key"),
        ("# only a comment\n", "it holds no key"),
        ("short-secret", "line 1: a key of 12 characters is not of 16 to 256"),
        ("s" * 257, "line 1: a key of 257 characters"),
        (f"\n{FIRST}\nalice {FIRST}", "line 3: the key is that of an earlier line"),
        (f"alice b {FIRST}", "line 1: it has 3 words"),
        (f"1 {FIRST}", "line 1: the word before the key is no name"),
        (f"{SECOND}:x {FIRST}", "line 1: the word before the key is no name"),
        ("schlüssel-0123456789", "line 1: the key has characters outside ASCII"),
        ("\x1b-key-0123456789-0123", "line 1: the key has characters outside ASCII"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_unseen(tmp_path, text, words):
    with pytest.raises(SettingsError) as refused:
        open_keys(key_file(tmp_path, text), {})
    message = str(refused.value)
    assert words in message
    assert not any(word in message for word in (FIRST, SECOND, "short-secret", "schlüssel", "sss"))


@pytest.mark.parametrize("value", ["", ",", "short"])
def test_a_variable_without_a_usable_key_is_refused(value):
    with pytest.raises(SettingsError, match=f"\\${KEY_VARIABLE}"):
        open_keys(None, {KEY_VARIABLE: value})


def test_files_that_cannot_be_read_are_refused(tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff" * 40)
    large = tmp_path / "large"
    large.write_bytes(b"#" * (1 << 20) + b"\n" + FIRST.encode())
    for path, words in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "not text in UTF-8"),
        (large, "more than 1048576 bytes"),
    ):
        with pytest.raises(SettingsError, match=words):
            open_keys(path, {})
    with pytest.raises(SettingsError, match="Leave out one of them"):
        open_keys(key_file(tmp_path, FIRST), {KEY_VARIABLE: SECOND})


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_warned_of(tmp_path, capsys, mode, warns):
    open_keys(key_file(tmp_path, FIRST, mode), {})
    printed = capsys.readouterr().err
    assert ("chmod 600" in printed and f"mode {mode:o}" in printed) is warns
    assert FIRST not in printed


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        FIRST,
        f"Basic {FIRST}",
        f"Bearer {FIRST}x",
        f"Bearer {FIRST[:-1]}",
        f"Bearer {FIRST.upper()}",
        f"Bearer {FIRST} {FIRST}",
        "Bearer \xff\u20ac",
    ],
)
def test_other_headers_are_no_keys(header):
    with pytest.raises(RefusedError) as refused:
        ApiKeys([FIRST], "keys").owner(header)
    assert refused.value.status == 401 and "Authorization: Bearer KEY" in str(refused.value)
    assert FIRST.upper()[:-1] not in str(refused.value).upper()


def test_the_api_needs_a_key_and_its_error_has_openais_form(served):
    client, jobs = served
    body = {"prompt": "a", "max_tokens": 1}
    for headers in ({}, bearer("wrong-key-0123456789")):
        for answer in (
            client.post("/v1/completions", json=body, headers=headers),
            client.post("/v1/completions", content=b"{", headers=headers),
            client.post("/v1/chat/completions", json={}, headers=headers),
            client.get("/v1/models", headers=headers),
            client.get("/v1/models/tiny", headers=headers),
            client.get("/v1/adaptation", headers=headers),
        ):
            error = answer.json()["error"]
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert error["type"] == "invalid_request_error" and error["code"] == "invalid_api_key"
            assert "wrong-key" not in answer.text
    assert jobs == [], "nothing of a refused request reaches the model"
    assert client.get("/v1/models", headers=bearer(SECOND)).status_code == 200


def test_the_key_names_the_owner_of_a_job(served):
    client, jobs = served
    for key in (FIRST, SECOND):
        answer = client.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=bearer(key)
        )
        assert answer.status_code == 200
    assert [job.tenant for job in jobs] == ["alice", "2"]


def test_paths_without_secrets_need_no_key(served):
    client, _ = served
    assert client.get("/health").status_code == client.get("/").status_code == 200
    assert client.get("/metrics").status_code in (200, 501)
    assert client.get("/nowhere").status_code == 404
    assert client.get("//v1/models").status_code == 404
