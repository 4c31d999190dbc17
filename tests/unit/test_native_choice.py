"""--native, --dtype int8 and --threads: what the library runs, what is refused, what is printed."""

import json
import os
import threading

import pytest
import torch

from megatron_sorted.commands import generate as generate_command
from megatron_sorted.commands.generate import read_arguments
from megatron_sorted.commands.options.decoding import open_generator
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.native import choice, library
from megatron_sorted.decoding.native.choice import native_kind, native_threads
from megatron_sorted.decoding.native.library import FLOAT32, native_library
from megatron_sorted.decoding.native.trial import INPUTS, OUTPUTS, ROWS, numbers, product
from megatron_sorted.decoding.network import load_network
from megatron_sorted.decoding.open_model import open_text_generator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.doctor.finding import OK, WARN
from megatron_sorted.doctor.native import check_native
from megatron_sorted.errors import DataError, SettingsError
from tests.support.evaluated import write_model
from tests.support.stand_in_compiler import COPY, session_library, stand_in

REASON = "CXX=/nowhere/cxx names no program that can be run"
GARBAGE = 'case "$*" in *--version*) echo "cxx 7"; exit; esac\necho garbage > "$out"'
CHOICES_OF = {
    # native, dtype, device -> kind, or the start and the end of a refusal
    ("auto", torch.float32, "cpu"): "float32",
    ("auto", torch.bfloat16, "cpu"): "bfloat16",
    ("auto", torch.int8, "cpu"): "int8",
    ("auto", torch.float16, "cpu"): None,
    ("auto", torch.float32, "cuda:0"): None,
    ("auto", torch.int8, "cuda:0"): ("--dtype int8: the compiled library runs on CPUs", "float16."),
    ("on", torch.bfloat16, torch.device("cpu")): "bfloat16",
    ("on", torch.int8, "cpu"): "int8",
    ("on", torch.float16, "cpu"): ("--native on: the compiled library does not know float16", "."),
    ("on", torch.float32, "cuda"): ("--native on: the compiled library runs on CPUs", "float16."),
    ("off", torch.float32, "cpu"): None,
    ("off", torch.float16, "cuda"): None,
    ("off", torch.int8, "cpu"): ("--dtype int8: only the compiled library decodes", "bfloat16."),
    ("of", torch.float32, "cpu"): ("--native: of is not one of auto, on, off", "one of them."),
    ("auto", torch.int32, "cpu"): ("--dtype: int32 is no kind of weights", "int8."),
}


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Let this test's notes and library be the first of the process."""
    session_library()
    monkeypatch.setattr(choice, "_reported", set())
    choice._clipped.cache_clear()
    yield
    choice._clipped.cache_clear()


def kind_of(network) -> str | None:
    """Return the kind of weights with which the library runs a network; None: torch runs it."""
    return network.kind if network.is_native else None


@pytest.fixture
def path(tmp_path, capsys):
    """Return the directory of a model; what transformers prints is forgotten."""
    written = write_model(tmp_path / "m", num_layers=2)
    capsys.readouterr()
    return written


@pytest.fixture
def without_compiler(monkeypatch):
    """Take the compiler away."""
    monkeypatch.setenv("CXX", "/nowhere/cxx")
    library._own_library.cache_clear()
    yield
    library._own_library.cache_clear()


@pytest.mark.parametrize(("given", "expected"), CHOICES_OF.items())
def test_choices(given, expected):
    if isinstance(expected, tuple):
        with pytest.raises(SettingsError) as refused:
            native_kind(*given)
        start, end = expected
        assert str(refused.value).startswith(start) and str(refused.value).endswith(end)
    else:
        assert native_kind(*given) == expected


def test_by_default_the_library_decodes_what_torch_decodes(path, capsys):
    with_library, torch_s = load_network(path), load_network(path, native="off")
    assert kind_of(with_library) == "float32" and kind_of(torch_s) is None
    texts = [[3, 5, 8], [2, 9, 4, 1, 7]]
    written = [
        [text.tokens for text in generate(network, texts, limits=Limits(12))]
        for network in (with_library, torch_s)
    ]
    assert written[0] == written[1]
    assert kind_of(load_network(path, graphs=True)) is None
    assert capsys.readouterr().err == ""
    assert kind_of(load_network(path, dtype=torch.float16)) is None
    assert capsys.readouterr().err.endswith(
        "it does not know float16, only float32, bfloat16, int8\n"
    )


def test_without_a_compiler_torch_decodes_and_one_line_says_so(
    path, tmp_path, capsys, without_compiler
):
    networks = [load_network(path), load_network(path), load_network(path, dtype=torch.bfloat16)]
    assert [kind_of(network) for network in networks] == [None] * 3
    assert capsys.readouterr().err == (
        f"note: torch decodes, more slowly than the compiled library (--native): {REASON}\n"
    )
    assert kind_of(load_network(path, native="off")) is None
    for options, message in (
        ({"native": "on"}, f"--native on: {REASON}. Correct that, or use --native auto."),
        (
            {"dtype": torch.int8},
            f"--dtype int8: only the compiled library decodes with it, and {REASON}. Correct "
            "that, or use --dtype float32 or bfloat16.",
        ),
    ):
        with pytest.raises(SettingsError) as refused:
            load_network(tmp_path / "is not even read", **options)
        assert str(refused.value) == message
    assert capsys.readouterr().err == ""


def test_a_failed_compilation_is_not_repeated_in_a_process(path, tmp_path, monkeypatch, capsys):
    tmp_path.chmod(0o700)
    machine = stand_in(tmp_path, "exit 1")
    monkeypatch.setenv("CXX", str(machine.program))
    monkeypatch.setenv("MEGATRON_SORTED_CACHE", str(tmp_path / "cache"))
    library._own_library.cache_clear()
    try:
        for _ in range(3):
            assert kind_of(load_network(path)) is None
        runs = len(machine.runs)
        load_network(path)
        assert len(machine.runs) == runs > 0
    finally:
        library._own_library.cache_clear()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == ["compiling", "note:"]


def test_a_part_that_the_library_does_not_know(path, monkeypatch, capsys):
    known = load_network(path, native="off")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    network = load_network(path)
    assert kind_of(network) is None
    assert "an MLP's activation is GELU" in capsys.readouterr().err
    [text] = generate(network, [[3, 5, 8]], limits=Limits(8))
    [other] = generate(known, [[3, 5, 8]], limits=Limits(8))
    assert text.tokens != other.tokens
    for options in ({"native": "on"}, {"dtype": torch.int8}):
        with pytest.raises(SettingsError, match="activation is GELU"):
            load_network(path, **options)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("native", ["auto", "on", "off"])
def test_a_draft_model_follows_the_model(path, capsys, kind, native):
    if (kind, native) == ("int8", "off"):
        return
    generator = open_text_generator(path, draft=path, dtype=getattr(torch, kind), native=native)
    for network in (generator.network, generator.draft):
        assert kind_of(network) == (None if native == "off" else kind)
    assert capsys.readouterr().err == ""


def test_a_draft_model_that_the_library_does_not_know(path, tmp_path, capsys):
    draft = write_model(tmp_path / "d", num_layers=2)
    capsys.readouterr()
    config = (draft / "config.json").read_text()
    (draft / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    generator = open_text_generator(path, draft=draft)
    assert [kind_of(generator.network), kind_of(generator.draft)] == ["float32", None]
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SettingsError, match="--native on: an MLP's activation is GELU"):
        open_text_generator(path, draft=draft, native="on")


def test_a_model_that_torch_runs_has_a_draft_model_that_torch_runs(path, tmp_path, capsys):
    draft = write_model(tmp_path / "d", num_layers=2)
    capsys.readouterr()
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    generator = open_text_generator(path, draft=draft)
    assert [kind_of(generator.network), kind_of(generator.draft)] == [None, None]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ((), "float32"),
        (("--native", "off"), None),
        (("--native", "on", "--dtype", "int8"), "int8"),
        (("--dtype", "bfloat16"), "bfloat16"),
        (("--dtype", "float16"), None),
    ],
)
def test_options_of_commands(path, options, kind):
    values = read_arguments([str(path), "--prompt", "a", "--device", "cpu", *options])
    network = open_generator(values).network
    assert kind_of(network) == kind


def test_float16_is_left_to_torch_with_one_line(path, capsys, monkeypatch):
    monkeypatch.setattr(choice, "_reported", set())
    for _ in range(2):
        assert kind_of(opened(path, "--dtype", "float16")) is None
    assert [line for line in capsys.readouterr().err.splitlines() if "torch" in line] == [
        "note: torch decodes, more slowly than the compiled library (--native): it does not know "
        "float16, only float32, bfloat16, int8"
    ]
    monkeypatch.setattr(choice, "_reported", set())
    opened(path, "--dtype", "float16", "--native", "off")
    assert "torch decodes" not in capsys.readouterr().err


def opened(path, *options, **more):
    """Return the network that a command decodes with."""
    return open_generator(
        read_arguments([str(path), "--prompt", "a", "--device", "cpu", *options]), **more
    ).network


def test_the_tuned_kind_is_used_unless_another_one_is_named(path):
    tuned = {"format": 1, "strategies": {}, "dtype": "int8", "native": True}
    (path / "decoding.json").write_text(json.dumps(tuned))
    assert kind_of(opened(path)) == "int8"
    assert kind_of(opened(path, "--dtype", "bfloat16")) == "bfloat16"
    assert kind_of(opened(path, as_tuned=False)) == "float32"
    off = opened(path, "--native", "off")
    assert kind_of(off) is None and off.dtype == torch.float32
    (path / "decoding.json").write_text(json.dumps(tuned | {"dtype": "bfloat16"}))
    off = opened(path, "--native", "off")
    assert kind_of(off) is None and off.dtype == torch.bfloat16
    (path / "decoding.json").write_text(json.dumps(tuned | {"dtype": "int4"}))
    with pytest.raises(DataError, match="int4"):
        opened(path)


def test_the_tuned_kind_without_a_library(path, capsys, without_compiler):
    tuned = {"format": 1, "strategies": {}, "dtype": "int8", "native": True}
    (path / "decoding.json").write_text(json.dumps(tuned))
    network = opened(path)
    assert kind_of(network) is None and network.dtype == torch.float32
    assert REASON in capsys.readouterr().err
    with pytest.raises(SettingsError, match=r"^--dtype int8: only the compiled library"):
        opened(path, "--dtype", "int8")


def test_generate_writes_with_each_kind(path, capsys):
    for kind in ("float32", "bfloat16", "int8"):
        command = [str(path), "--prompt", "a b", "--max-new-tokens", "4", "--dtype", kind]
        generate_command.main([*command, "--device", "cpu"])
        printed = capsys.readouterr()
        assert "[full: 4 tokens in" in printed.err and "torch decodes" not in printed.err


def test_more_threads_than_cores_are_clipped_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(choice, "usable_cores", lambda: 3)
    monkeypatch.setattr(choice.torch, "get_num_threads", lambda: 3)
    assert native_threads() == 3 and capsys.readouterr().err == ""
    monkeypatch.setattr(choice.torch, "get_num_threads", lambda: 64)
    assert [native_threads(), native_threads()] == [3, 3]
    assert capsys.readouterr().err == (
        "note: 64 threads are more than the 3 CPU cores that are usable here: the compiled library "
        "uses 3\n"
    )
    monkeypatch.setattr(choice.torch, "get_num_threads", lambda: 65)
    assert native_threads() == 3 and capsys.readouterr().err == ""


def in_a_fork(work) -> bool:
    """Return whether ``work`` succeeds in a forked process, within some seconds."""
    pid = os.fork()
    if pid == 0:
        threading.Timer(20, lambda: os._exit(3)).start()
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


def test_a_forked_process_has_threads_of_its_own():
    weights, inputs = numbers(OUTPUTS * INPUTS, 1), numbers(ROWS * INPUTS, 2)

    def multiply() -> list[float]:
        return product(native_library(), FLOAT32, weights, inputs)

    expected = multiply()
    assert in_a_fork(lambda: multiply() == expected)
    assert in_a_fork(lambda: in_a_fork(lambda: multiply() == expected))
    assert multiply() == expected


def test_a_fork_while_another_thread_decodes():
    weights, inputs = numbers(OUTPUTS * INPUTS, 1), numbers(ROWS * INPUTS, 2)
    expected, stop, wrong = product(native_library(), FLOAT32, weights, inputs), [], []

    def work() -> None:
        while not stop:
            if product(native_library(), FLOAT32, weights, inputs) != expected:
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        results = [
            in_a_fork(lambda: product(native_library(), FLOAT32, weights, inputs) == expected)
            for _ in range(12)
        ]
    finally:
        stop.append(1)
        thread.join()
    assert all(results) and not wrong


def test_the_doctor_names_compiler_and_instructions(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    used = choice.native_library().native_instructions().decode()
    [finding] = check_native(os.environ, False, False)
    assert finding.verdict == OK
    assert finding.value.startswith(f"would be compiled for {used} by /")
    machine = stand_in(tmp_path, f'case "$*" in *--version*) echo "cxx 7"; exit; esac\n{COPY}')
    [finding] = check_native(machine.environment, False, True)
    assert finding.value == f"compiled for {used} by {machine.program} (cxx 7)"
    assert len(list(machine.cache.glob("*.so"))) == 1


def test_the_doctor_without_a_library(tmp_path):
    tmp_path.chmod(0o700)
    nothing = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    [finding] = check_native(nothing, False, False)
    assert finding.verdict == WARN and "no C++ compiler" in finding.value
    assert "apt install g++" in finding.remedy
    [finding] = check_native(nothing, True, False)
    assert finding.verdict == OK and "no C++ compiler" in finding.value
    machine = stand_in(tmp_path, GARBAGE)
    [finding] = check_native(machine.environment, False, True)
    assert finding.verdict == WARN and "does not work here" in finding.value
    [finding] = check_native(machine.environment, False, False)
    assert finding.verdict == WARN and "to try again" in finding.value
