"""How every command begins and ends, so that nothing a user types, pipes or interrupts ends in a traceback.

Standard library alone: a command starts with this, and imports what is slow afterwards.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megatron_sorted import __version__
from megatron_sorted.errors import SortedError
from megatron_sorted.reading.shown import one_line, printable

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds this package: a checkout's, or the one where pip installed it."""
IS_CHECKOUT = ROOT.name not in ("site-packages", "dist-packages")
_ARGPARSE_ERROR = argparse.ArgumentParser.error
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells write it: 128 + SIGINT."""
BROKEN_PIPE = 141
"""Exit status when nobody reads the output any more, as in ``| head``: 128 + SIGPIPE."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""Errors of the system that are a user's to mend though they name no file."""


def start_command() -> None:
    """Prepare the process of a command, before its slow imports: standard streams that take any text, a quiet Ctrl-C, ``--version``."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # what a terminal's encoding lacks is shown as \xe9, not fatal
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(
            errors="strict"
        )  # in the C locale Python would let bytes through that are no text
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # it may be ignored, as after nohup
        signal.signal(signal.SIGINT, _stop_at_once)
    if sys.argv[1:] == ["--version"]:
        run_main(lambda: print(f"megatron_sorted {__version__}"))


def run_main(
    main: Callable[[], int | None],
    stopped: str = "",
    clean_up: Callable[[], None] = lambda: None,
    report: Callable[[Exception], NoReturn] | None = None,
) -> NoReturn:
    """Run ``main`` and end the process with its exit status, or with one line and 1 (an error), 130 (Ctrl-C) or 141 (broken pipe).

    Args:
        main: The command; returns its exit status, None for 0.
        stopped: What to say of the work when Ctrl-C stopped it.
        clean_up: Called before the line of an error or a stop is printed.
        report: Called with an error instead of printing it; must end the process.
    """
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    argparse.ArgumentParser.error = _refuse_words  # its own repeats the words as they are
    status = None
    try:
        status = _status_of(main, stopped, clean_up, report)
    finally:
        status = _flush(status)
    sys.exit(status)


def sentence_of(error: BaseException) -> str | None:
    """Return what a user reads of an error they can mend, in one line; None for a fault of the program.

    Names of files and in files may hold anything; what a terminal would obey is written as escapes.
    """
    sentence = _sentence(error)
    return None if sentence is None else one_line(sentence)


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, SortedError):
        return str(error)
    if isinstance(error, UnicodeEncodeError) and has_half_pairs(error.object):
        return f"{error.object[:80]!r} is not text: it holds bytes that are not UTF-8. Correct it."
    if (
        isinstance(error, OSError)
        and error.strerror
        and (error.filename is not None or error.errno in FULL)
    ):
        names = " -> ".join(
            os.fsdecode(name)
            for name in (error.filename, error.filename2)
            if isinstance(name, str | bytes | os.PathLike)
        )
        return f"{names}{': ' if names else ''}{error.strerror}. Check the path, its permissions and the free space."
    if isinstance(error, MemoryError):
        return "out of memory. Ask for less at once, or use a machine with more."
    return None


def _status_of(
    main: Callable[[], int | None],
    stopped: str,
    clean_up: Callable[[], None],
    report: Callable[[Exception], NoReturn] | None,
) -> int:
    try:
        _check_words(sys.argv[1:])
        return main() or 0
    except SystemExit as end:  # argparse's
        if isinstance(end.code, str):
            _say(printable(end.code))
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, _stop_at_once)
        clean_up()
        _say(f"\nstopped. {stopped}".rstrip())
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (_lost_reader(1) or _lost_reader(2)):
            return BROKEN_PIPE
        clean_up()
        if report is not None:
            report(error)
        sentence = sentence_of(error)
        if sentence is None:
            raise
        _say(f"error: {sentence}")
        return 1


def _refuse_words(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    _ARGPARSE_ERROR(parser, one_line(message))


def _check_words(words: list[str]) -> None:
    """Check that words of the command line are text, unless they name a file: files may have any bytes in their names.

    Raises:
        SortedError: One is not.
    """
    for word in words:
        if has_half_pairs(word) and not any(map(os.path.lexists, (word, word.partition("=")[2]))):
            raise SortedError(
                f"{word[:80]!r} on the command line is not UTF-8, and no file has this name. Write it in UTF-8."
            )


def has_half_pairs(text: str) -> bool:
    """Return whether a text holds surrogates: bytes that were not UTF-8, or half of a UTF-16 pair; no encoding has them."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _flush(status: int | None) -> int | None:
    """Return the exit status after writing what is left of the output; where that fails, it goes nowhere, also at Python's own end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return status or BROKEN_PIPE
        _say(f"error: standard output: {error.strerror}. What was printed is not complete.")
        return status or 1
    return status


def _say(line: str) -> None:
    with suppress(OSError):  # standard error may be a broken pipe too
        print(line, file=sys.stderr, flush=True)


def _lost_reader(descriptor: int) -> bool:
    """Return whether nobody reads what a stream writes: then a broken pipe is the user's wish and no fault."""
    import select

    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _open_closed_streams() -> None:
    """Open closed standard streams to nowhere: else the next file that is opened takes their number, and prints go into it."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for the process's life


def _stop_at_once(*_: object) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"\nstopped.\n")
    os._exit(INTERRUPTED)


def own_module(
    name: str, *words: object, environment: Mapping[str, str] = os.environ
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs a module of this package with its arguments, and the environment that finds the package.

    The current folder is not for imports; Python 3.10 has no word for that.
    """
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if IS_CHECKOUT and str(ROOT) not in entries:
        entries.insert(0, str(ROOT))
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *safe, "-m", name, *map(str, words)], {
        **environment,
        "PYTHONPATH": os.pathsep.join(entries),
    }
