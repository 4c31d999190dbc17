"""The wording rules, and a command that lists their breaches.

    python -m tests.rules.language PATH...

To retire a word, add a row with its replacement to ``RETIRED_NAMES`` or ``RETIRED_PHRASES``.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

RETIRED_NAMES = {
    "way": "strategy, method, mode",
    "ways": "strategies, methods",
    "told": "name the value",
    "said": "name the value",
    "asked": "requested, or name the value",
    "found": "name what was found",
    "gone": "finished, removed, lost",
    "aside": "temporary, staged",
    "box": "name the value",
    "boxes": "name the values",
    "travelling": "carried, copied",
    "hung": "attached",
    "words": "arguments, text",
    "say": "log, print, report",
}
"""Words that no name of the program contains -> replacements."""

RETIRED_PHRASES = {
    r"\bReturns? nothing\b": "say what the function does: Check that ..., Record ...",
    r"\b(?:told|said)\b": "given, stated, reported",
    r"\bgone\b": "finished, removed, lost",
    r"\baside\b": "to a temporary name",
    r"\bso many\b|\bequally many\b": "this many, the same number of",
    r"\bgo(?:es)? on with\b|\btexts? that go(?:es)? on\b": "continue",
    r"\btravel(?:s|led|ling)?\b": "is copied, is carried over",
    r"\bways? (?:to|of|that|is|are|was|can)\b|\bof ways\b|\b(?:every way|other ways)\b": (
        "strategy, method"
    ),
    r"\bnobody\b": "no one, or say it actively",
    r"\bhung\b|\bhangs? (?:on|at|from) (?:a|an|the)\b": "attached, attach",
    r"\bboxes\b": "rectangles, lists",
    r"\bof (?:its|their) own making\b|\bmade of\b": "consists of, contains",
    r"\bhow sure\b": "confidence",
    r"\btakes? note\b": "record",
    r"\btwice over\b": "two times",
}
"""Patterns that no docstring, comment, text or page of the project contains -> replacements."""

FRAGMENT = re.compile(
    r"^\s+[a-z_][\w, ]*: (?:Of|By|As|Before|After|Between|Its|Those|That|Said|To)\b"
)
"""The line of an attribute or argument that does not start with a noun phrase."""


def name_parts(name: str) -> list[str]:
    """Return the words of an identifier in lower case."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def breaches(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, sentence) for everything in a Python file that breaks a wording rule."""
    defined = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.append(node.id if isinstance(node, ast.Name) else node.attr)
        for name in names:
            for word in RETIRED_NAMES.keys() & set(name_parts(name)):
                if (node.lineno, name) not in defined:
                    defined.add((node.lineno, name))
                    yield node.lineno, f"name {name}: {word} ({RETIRED_NAMES[word]})"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if token.type == tokenize.COMMENT or "STRING" in kind:
            for offset, line in enumerate(token.string.split("\n")):
                yield from ((token.start[0] + offset, text) for text in phrase_breaches(line))


def phrase_breaches(line: str) -> Iterator[str]:
    """Yield a sentence for each retired phrase or opening in one line of text."""
    for pattern, better in RETIRED_PHRASES.items():
        if match := re.search(pattern, line, re.IGNORECASE):
            yield f"{match[0]!r}: {better}"
    if match := FRAGMENT.search(line):
        yield f"{match[0].strip()!r}: start with a noun phrase"


def main() -> int:
    """Print every breach in the named files and folders; return 1 if there is one."""
    count = 0
    for top in map(Path, sys.argv[1:]):
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            text = path.read_text(encoding="utf-8")
            lines = text.split("\n")
            listed = (
                breaches(text)
                if path.suffix == ".py"
                else ((n, s) for n, line in enumerate(lines, 1) for s in phrase_breaches(line))
            )
            for number, sentence in sorted(set(listed)):
                count += 1
                print(f"{path}:{number}: {sentence}")
    print(f"{count} breaches", file=sys.stderr)
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
