"""Records of JSON files and lines of texts: ends of lines, formats of files.

Files that are neither are refused.
"""

import gzip
import json
import os

import pytest

from megatron_sorted.data.preparation.templates import holds_records
from megatron_sorted.errors import DataError
from megatron_sorted.reading import json_lines, json_values, text_file
from megatron_sorted.reading.json_lines import (
    first_record,
    read_blocks,
    read_records,
    records,
    total_bytes,
)
from megatron_sorted.reading.text_file import read_text, split_lines

ODD = "a\u2028b\x0bc\x0cd\x1ce\x85f\rg"
"""What str.splitlines would cut into seven."""


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 7, 30, 1 << 20])
@pytest.mark.parametrize("limit", [None, 1, 4, 7, 100])
def test_blocks_hold_every_line_once(tmp_path, monkeypatch, zipped, block_bytes, limit):
    monkeypatch.setattr(json_lines, "BEGINNING_BYTES", 1)
    texts = [b'{"a": 1}\n\n{"b": "\\u2028"}\n{"c": "line\xe2\x80\xa8separator"}\n', b"", b"[2]\n3"]
    paths = []
    for i, text in enumerate(texts):
        paths.append(str(tmp_path / str(i)))
        (tmp_path / str(i)).write_bytes(gzip.compress(text) if zipped else text)
    seen, read = [], []
    for block in read_blocks(paths, limit, read.append, block_bytes):
        seen += [(int(block.path[-1]), number, record) for number, record, _ in records(block)]
    lines = [
        (0, 1, {"a": 1}),
        None,
        (0, 3, {"b": "\u2028"}),
        (0, 4, {"c": "line\u2028separator"}),
        (2, 1, [2]),
        (2, 2, 3),
    ]
    assert seen == [line for line in lines[:limit] if line]
    if limit is None or limit > 6:
        assert sum(read) == sum((tmp_path / str(i)).stat().st_size for i in (0, 2))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: data[:60] + b"\xff" * 8 + data[68:]]
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "x.gz"
    path.write_bytes(
        damage(gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(2000))))
    )
    with pytest.raises(DataError, match=r"x\.gz: damaged gzip stream"):
        list(read_blocks([str(path)]))


def read(path, content: bytes, **options) -> list:
    path.write_bytes(content)
    return [value for _, value in read_records(path, **options)]


def test_a_line_ends_at_a_line_feed_and_nothing_else(tmp_path):
    line = json.dumps({"text": ODD}, ensure_ascii=False).replace("\\r", "\r").encode()
    assert (
        split_lines(f"{ODD}\r\n{ODD}\n\nend") == [ODD, ODD, "", "end"]
        and split_lines("a\n") == ["a"]
        and split_lines("") == []
    )
    escaped = json.dumps({"text": ODD}, ensure_ascii=False).encode()
    assert read(tmp_path / "x", escaped + b"\r\n" + escaped + b"\n") == [{"text": ODD}] * 2
    with pytest.raises(
        DataError, match="x:1: not_json"
    ):  # JSON's texts hold no control characters as they are
        read(tmp_path / "x", line)
    (tmp_path / "t.txt").write_bytes(f"{ODD}\r\nb".encode())
    assert read_text(tmp_path / "t.txt") == f"{ODD}\nb"


@pytest.mark.parametrize("zipped", [False, True])
def test_byte_order_mark_and_compression_are_recognised_by_content(tmp_path, zipped):
    content = b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}'
    content = gzip.compress(content) if zipped else content
    assert read(tmp_path / "x.txt", content) == [{"text": "a"}, {"text": "b"}]
    assert read_text(tmp_path / "x.txt") == '{"text": "a"}\n{"text": "b"}'


@pytest.mark.parametrize("window", [16, 1 << 20])
@pytest.mark.parametrize(
    "write",
    [
        lambda rows: json.dumps(rows),
        lambda rows: json.dumps(rows, indent=2),
        lambda rows: "\n [\n" + ",\n".join(map(json.dumps, rows)) + "]\n ",
        lambda rows: "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows),
    ],
)
def test_lists_and_objects_over_several_lines(tmp_path, monkeypatch, window, write):
    monkeypatch.setattr(json_values, "READ_BYTES", window)
    monkeypatch.setattr(json_lines, "BEGINNING_BYTES", max(window, 64))
    rows = [
        {"text": f"größer {number}\nb", "more": [{"n": number, "x": None}] * number}
        for number in range(20)
    ]
    path = tmp_path / "rows"
    assert read(path, write(rows).encode()) == rows and first_record(path) == rows[0]
    blocks = list(read_blocks([str(path)], limit=7, block_bytes=100))
    values = [(number, value) for block in blocks for number, value, _ in records(block)]
    assert (
        values == list(enumerate(rows[:7], 1))
        and blocks[0].place(3) == f"{path}, record 3"
        and len(blocks) > 1
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a": 2}', r"line 2, record 3: the list has no end"),
        (b'[{"a": 1}\n{"a": 2}]', r"line 2, record 2: neither a comma"),
        (b'[{"a": 1},\n{"a": }]', r"line 2, record 2: not JSON"),
        (b'[{"a": 1}] []', r"line 1, record 2: something follows"),
        (b'[{"a": "\xff"}]', r"not UTF-8"),
        (
            b'[{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}]",
            "record 1: nested(_too_deep| more than 100 deep)",
        ),
        (b'[{"a": ' + b"1" * 50 + b"}]", r"record 1: a number of 50 digits"),
        (b'[{"a": ' + b"[" * 150 + b"]" * 150 + b"}]", "record 1: nested_too_deep"),
        (b'{\n"a": 1}\n{\n"a": ]', r"line 4, record 2: not JSON"),
    ],
)
def test_damaged_lists(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x", content)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not_json"),
        (b'{"a": "\xff"}', "not_utf8"),
        (b"[" * 100_000, "nested_too_deep"),
        (b"[" * 101 + b"]" * 101, "nested_too_deep"),
        (b"1" * 41, "number_too_long"),
        (b"-" + b"1" * 5000, "number_too_long"),
        (b'{"a" 1}', "not_json"),
    ],
)
def test_lines_that_are_not_json(tmp_path, line, reason):
    (tmp_path / "x").write_bytes(b'{"b": 1}\n\n' + line + b"\n")
    [block] = read_blocks([str(tmp_path / "x")])
    assert list(records(block))[1] == (3, None, reason)
    with pytest.raises(DataError, match=rf"x:3: {reason}\. Correct"):
        list(read_records(tmp_path / "x"))


def test_numbers_and_nesting_within_the_bounds():
    line = b"[" * 100 + b"1" * 40 + b"]" * 100
    [(_, value, reason)] = records(json_lines.Block("x", 1, line))
    assert reason is None and str(value).strip("[]") == "1" * 40


def test_memory_is_bounded(tmp_path, monkeypatch):
    for name in ("MAX_LINE_BYTES", "BEGINNING_BYTES"):
        monkeypatch.setattr(json_lines, name, 1000)
    monkeypatch.setattr(json_values, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_values, "READ_BYTES", 300)
    with pytest.raises(DataError, match=r"x:2: more than 1,000 bytes in one line. Cut"):
        list(read_blocks([str(_written(tmp_path, b'{"a": 1}\n' + b"x" * 5000))], block_bytes=100))
    with pytest.raises(DataError, match=r"line 1, record 2: no value ends within 1,000 bytes"):
        list(
            read_blocks(
                [str(_written(tmp_path, b'[{"a": 1}, {"a": "' + b"x" * 5000 + b'"}]'))],
                block_bytes=100,
            )
        )
    with pytest.raises(
        DataError, match=r"x: more than 100 bytes, the limit for a text. Give a part"
    ):
        read_text(_written(tmp_path, gzip.compress(b"x" * 101)), max_bytes=100)


def _written(folder, content: bytes):
    (folder / "x").write_bytes(content)
    return folder / "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(
            (magic + b"abc", what.partition(".")[0])
            for magic, what in text_file.OTHER_FORMATS.items()
        ),
        (b"a\nb\n\xff", "line 3: not UTF-8 at byte 4"),
    ],
)
def test_files_that_are_not_text_are_named_with_a_remedy(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_text(_written(tmp_path, content))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b'\n{"text": "a"}\n', True),
        ("a.txt", b'[{"messages": []}]', True),
        ("a.txt", b'{"other": 1}', False),
        ("a.txt", b"text", False),
        ("a.txt", b'{"text": null}', False),
        ("a.jsonl", b"text", True),
        ("a.json", b"", True),
        ("a.NDJSON.gz", b"", True),
        ("a.gz", b"x", False),
    ],
)
def test_formats_are_recognised_by_content(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert holds_records(tmp_path / name) == expected


def test_paths_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "cannot be read twice"),
    ):
        with pytest.raises(DataError, match=message):
            total_bytes([str(path)])
    assert first_record(tmp_path / "pipe") is None and not holds_records(tmp_path / "absent")
    with pytest.raises(DataError, match="Is a directory"):
        read_text(tmp_path)
