"""The beginning and end of every command: no input, pipe or interrupt ends in a traceback.

The module imports the standard library alone; slow imports of a command come after its start.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from megatron_sorted import __version__
from megatron_sorted.errors import SortedError
from megatron_sorted.reading.shown import one_line, printable
from megatron_sorted.reading.text_file import has_surrogates

_ARGPARSE_ERROR = argparse.ArgumentParser.error
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells: 128 + SIGINT."""
BROKEN_PIPE = 141
"""Exit status when the reader of the output has ended, as in ``| head``: 128 + SIGPIPE."""
USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""Errors of the system that a user can correct though they name no file."""


def start_command() -> None:
    """Prepare the process of a command before its slow imports.

    Set standard streams that accept any text and a quiet Ctrl-C, and answer ``--version``.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # characters that a terminal's encoding lacks are printed as \\xe9 and not fatal
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        # in the C locale Python would accept bytes that are not text
        sys.stdin.reconfigure(errors="strict")
    # Ctrl-C may be ignored, as after nohup
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    if sys.argv[1:] == ["--version"]:
        run_main(lambda: print(f"megatron_sorted {__version__}"))


def run_main(
    main: Callable[[], int | None],
    stopped: str = "",
    clean_up: Callable[[], None] = lambda: None,
    report: Callable[[Exception], NoReturn] | None = None,
) -> NoReturn:
    """Run ``main`` and end the process with its exit status.

    An error prints one line and ends with status 1, Ctrl-C with 130, a broken pipe with 141.

    Args:
        main: The command; returns its exit status, None for 0.
        stopped: A sentence about the work, printed when Ctrl-C stopped it.
        clean_up: Called before the line of an error or a stop is printed.
        report: Called with an error instead of printing it; must end the process.
    """
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    argparse.ArgumentParser.error = _print_error  # argparse would print arguments unescaped
    status = None
    try:
        status = _status_of(main, stopped, clean_up, report)
    finally:
        status = _flush(status)
    sys.exit(status)


def sentence_of(error: BaseException) -> str | None:
    """Return an error that the user can correct as one line; None for a fault of the program.

    File names and contents may hold anything; control characters are written as escapes.
    """
    sentence = _sentence(error)
    return None if sentence is None else one_line(sentence)


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, SortedError):
        return str(error)
    if isinstance(error, UnicodeEncodeError) and has_surrogates(error.object):
        return f"{error.object[:80]!r} is not text: it holds bytes that are not UTF-8. Correct it."
    if (
        isinstance(error, OSError)
        and error.strerror
        and (error.filename is not None or error.errno in USER_ERRNOS)
    ):
        names = " -> ".join(
            os.fsdecode(name)
            for name in (error.filename, error.filename2)
            if isinstance(name, str | bytes | os.PathLike)
        )
        return (
            f"{names}{': ' if names else ''}{error.strerror}. "
            "Check the path, its permissions and the free space."
        )
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
        _check_text(sys.argv[1:])
        return main() or 0
    except SystemExit as end:  # argparse's
        if isinstance(end.code, str):
            _print_line(printable(end.code))
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, _stop_at_once)
        clean_up()
        _print_line(f"\nstopped. {stopped}".rstrip())
        return INTERRUPTED
    except Exception as error:  # the last place: a fault of the program is raised again
        if isinstance(error, BrokenPipeError) and (_lost_reader(1) or _lost_reader(2)):
            return BROKEN_PIPE
        clean_up()
        if report is not None:
            report(error)
        sentence = sentence_of(error)
        if sentence is None:
            raise
        _print_line(f"error: {sentence}")
        return 1


def _print_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    _ARGPARSE_ERROR(parser, one_line(message))


def _check_text(arguments: list[str]) -> None:
    """Check that arguments are text or name a file, whose name may have any bytes.

    Raises:
        SortedError: An argument is neither.
    """
    for argument in arguments:
        paths = (argument, argument.partition("=")[2])
        if has_surrogates(argument) and not any(map(os.path.lexists, paths)):
            raise SortedError(
                f"{argument[:80]!r} on the command line is not UTF-8, and no file has this name. "
                "Write it in UTF-8."
            )


def _flush(status: int | None) -> int | None:
    """Write the rest of the output and return the exit status.

    If that fails, the rest is dropped, so that Python's own exit does not fail again.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return status or BROKEN_PIPE
        _print_line(f"error: standard output: {error.strerror}. What was printed is not complete.")
        return status or 1
    return status


def _print_line(line: str) -> None:
    with suppress(OSError):  # standard error may be a broken pipe too
        print(line, file=sys.stderr, flush=True)


def _lost_reader(descriptor: int) -> bool:
    """Return whether a stream's reader has ended: then a broken pipe is intended, not a fault."""
    import select

    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _open_closed_streams() -> None:
    """Connect closed standard streams to /dev/null.

    Otherwise the next opened file takes their descriptor, and prints are written into it.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _stop_at_once(*_: object) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"\nstopped.\n")
    os._exit(INTERRUPTED)
