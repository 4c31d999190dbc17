"""JSON lines to indexed token files, with any number of processes and always the same bytes."""

import json
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from megatron_sorted.data.indexed import IndexedWriter
from megatron_sorted.data.preparation.counts import Summary
from megatron_sorted.data.preparation.encode import (
    Encoded,
    EncodeOptions,
    Encoder,
    encode_in_worker,
    start_worker,
    usable_spans,
)
from megatron_sorted.data.preparation.forms import SampleReader
from megatron_sorted.data.preparation.replacing import publish, remove_partial
from megatron_sorted.data.preparation.templates import detect_format
from megatron_sorted.data.preparation.train_tokenizer import train_sentencepiece
from megatron_sorted.errors import DataError
from megatron_sorted.files import discard_tree, same_path, write_text_atomically
from megatron_sorted.reading.json_lines import Block, read_blocks, records, total_bytes
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.prompt_form import ControlToken, PromptForm
from megatron_sorted.text.tokenizer.contract import NullTokenizer, Tokenizer

BLOCKS_AHEAD = 4
"""Blocks in advance per worker: enough to keep all busy, few enough to bound memory."""
FORMAT_LINES = 1000
"""Number of lines that are searched for the format."""


@dataclass(frozen=True)
class PrepareOptions:
    """The options of megatron-sorted prepare."""

    inputs: tuple[str, ...]
    output_prefix: str
    encode: EncodeOptions
    train_tokenizer: int | None = None
    workers: int = 1
    limit: int | None = None
    overwrite: bool = False


def output_names(prefix: str) -> tuple[str, str]:
    """Return the prefixes of the training and of the validation file."""
    return f"{prefix}_text_document", f"{prefix}_valid_text_document"


def find_format(paths: tuple[str, ...]) -> str:
    """Return the format of the first line whose fields show it.

    Raises:
        DataError: None of the first lines does.
    """
    fields: list[str] = []
    for block in read_blocks(paths, limit=FORMAT_LINES):
        for _, record, _ in records(block):
            if data_format := detect_format(record):
                return data_format
            fields = fields or (sorted(record) if isinstance(record, dict) else [])
    if not fields:
        raise DataError(
            f"--input: {shown(paths[0])} holds no JSON lines. {_remedy_for_plain_text(paths[0])}"
        )
    raise DataError(
        f"--format auto: no line among the first {FORMAT_LINES} of {shown(paths[0])} has a field "
        f"'messages', 'instruction' or 'text' (found: {shown(', '.join(fields))}). Rename the "
        "fields, or check the file."
    )


def _remedy_for_plain_text(path: str) -> str:
    return (
        f"To convert a plain text, use megatron-sorted split --input {shown(path)} --separator "
        "... --output DIRECTORY; it writes DIRECTORY/train.jsonl."
    )


def _check_outputs(options: PrepareOptions) -> None:
    names = [
        f"{name}.{ending}"
        for name in output_names(options.output_prefix)
        for ending in ("bin", "idx")
    ]
    names.append(f"{options.output_prefix}.json")
    if options.train_tokenizer:
        names.append(f"{options.output_prefix}_tokenizer.model")
    existing = [name for name in names if Path(name).exists()]
    if existing and not options.overwrite:
        raise DataError(
            f"--output-prefix: {', '.join(existing)} exist already. Choose another prefix, or "
            "give --overwrite."
        )
    read = [
        *options.inputs,
        *([options.encode.tokenizer_model] if options.encode.tokenizer_model else []),
    ]
    if inputs := [name for name in existing if any(same_path(name, path) for path in read)]:
        raise DataError(
            f"--output-prefix: {inputs[0]} is an input, and would be replaced by the output. "
            "Choose another prefix."
        )


def _staged_tokenizer(prefix: str) -> Path:
    path = Path(f"{prefix}_tokenizer.model")
    return path.parent / f".{path.stem}.training" / path.name


def _train_tokenizer(options: PrepareOptions, encode: EncodeOptions) -> str:
    """Return the path of a tokenizer trained on the texts of the input.

    It gets its final name together with the data that it encoded.
    """
    path = str(_staged_tokenizer(options.output_prefix))

    reader = SampleReader(
        encode.data_format,
        encode.prompt_template,
        NullTokenizer(1),
        append_eod=False,
        takes_both=encode.takes_both,
    )

    def read_texts() -> Iterator[str]:
        return (
            span.text
            for block in read_blocks(options.inputs, options.limit)
            for span in usable_spans(block, reader)
        )

    train_sentencepiece(read_texts, path, options.train_tokenizer, num_threads=options.workers)
    return path


def _encode_all(blocks: Iterator[Block], encode: EncodeOptions, workers: int) -> Iterator[Encoded]:
    """Yield the documents of the blocks in their order, whichever process encoded them."""
    if workers == 1:
        encoder = Encoder(encode)
        yield from map(encoder.encode, blocks)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(encode,)
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for block in blocks:
            waiting.append(_submit(pool, block))
            if len(waiting) > BLOCKS_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"--workers {workers}: a worker process died (out of memory?). Use fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, block: Block) -> Future[Encoded]:
    """Return the future of a block.

    A process that is started for it ignores Ctrl-C: this process ends it in an orderly manner.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(encode_in_worker, block)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare(options: PrepareOptions) -> Summary:
    """Write the indexed files and ``PREFIX.json``; return what was counted.

    Raises:
        DataError: Input is missing or damaged, outputs exist, or nothing is usable; then no file is
            written.
    """
    size = total_bytes(options.inputs)
    _check_outputs(options)
    try:
        return _prepare(options, size)
    finally:
        # left by a failure; published files have other names
        for name in output_names(options.output_prefix):
            remove_partial(name)
        discard_tree(_staged_tokenizer(options.output_prefix).parent)


def _prepare(options: PrepareOptions, size: int) -> Summary:
    start_time, encode = time.perf_counter(), options.encode
    if encode.data_format == "auto":
        encode = replace(encode, data_format=find_format(options.inputs), takes_both=True)
    if options.train_tokenizer:
        encode = replace(
            encode,
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=_train_tokenizer(options, encode),
        )
    # in this process too, so that a damaged tokenizer is an error before any process starts
    encoder = Encoder(encode)
    encode = replace(encode, prompt_template=encoder.form.label)
    summary = Summary(
        tokenizer={
            "type": encode.tokenizer_type,
            "name": encoder.tokenizer.name,
            "sha256": encoder.tokenizer.sha256,
            "vocab_size": encoder.tokenizer.vocab_size,
        },
        notes=encoder.tokenizer.notes,
    )
    ends: set[str] = set()
    train_name, valid_name = output_names(options.output_prefix)
    with_modes = encode.data_format != "text"
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=size, unit="B", unit_scale=True, disable=None, desc="prepare")
        )
        train = stack.enter_context(
            IndexedWriter(train_name, encoder.dtype, with_modes, publishes=False)
        )
        valid = None
        if encode.valid_fraction:
            valid = stack.enter_context(
                IndexedWriter(valid_name, encoder.dtype, with_modes, publishes=False)
            )
        for encoded in _encode_all(
            read_blocks(options.inputs, options.limit, bar.update), encode, options.workers
        ):
            summary.samples_read += encoded.num_samples
            summary.truncated += encoded.num_truncated
            summary.split += encoded.num_split
            ends |= encoded.ends
            summary.skipped.merge(encoded.skipped)
            summary.train.add(encoded.train)
            train.append(encoded.train)
            if valid is not None:
                summary.valid.add(encoded.valid)
                valid.append(encoded.valid)
        _check_enough(summary, encode, options.inputs[0])
    summary.prompt_form = with_ends(encoder.form, ends, encoder.tokenizer).as_dict()
    summary.seconds = time.perf_counter() - start_time
    _publish(options, [train_name] if valid is None else [train_name, valid_name])
    if valid is None:
        for ending in ("idx", "bin"):  # from an earlier run that --overwrite replaces
            Path(f"{valid_name}.{ending}").unlink(missing_ok=True)
    requested = {
        "inputs": [Path(path).name for path in options.inputs],
        "workers": options.workers,
        **encode.as_dict(),
    }
    write_text_atomically(f"{options.output_prefix}.json", summary.as_json(requested))
    return summary


def with_ends(form: PromptForm, ends: set[str], tokenizer: Tokenizer) -> PromptForm:
    """Return the form with every token that an answer of these data ends with.

    Calls of tools may end differently from text.
    """
    known = {end.text for end in form.ends}
    more = tuple(
        ControlToken(text, tokenizer.encode_rendered(text)[0]) for text in sorted(ends - known)
    )
    return replace(form, ends=form.ends + more)


def _publish(options: PrepareOptions, names: list[str]) -> None:
    """Give the written files their names, in place of earlier ones.

    Until the new summary is written, the existing one names no tokenizer, so that a run refuses
    data that may be another tokenizer's.
    """
    write_text_atomically(f"{options.output_prefix}.json", json.dumps({"unfinished": True}) + "\n")
    if options.train_tokenizer:
        os.replace(
            _staged_tokenizer(options.output_prefix), f"{options.output_prefix}_tokenizer.model"
        )
    publish(names)


def _check_enough(summary: Summary, encode: EncodeOptions, path: str) -> None:
    if not summary.train.documents:
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in summary.skipped.count.items())
            or "no lines"
        )
        remedy = "Check the file and --format."
        if summary.skipped.count.keys() <= {"not_json"}:
            remedy += f" {_remedy_for_plain_text(path)}"
        raise DataError(
            f"--input: none of {summary.samples_read} samples can be used ({reasons}). {remedy}"
        )
    if encode.valid_fraction and not summary.valid.documents:
        raise DataError(
            f"--valid-fraction {encode.valid_fraction}: none of {summary.train.documents} "
            "documents fell into it. Raise it, or give more data."
        )
