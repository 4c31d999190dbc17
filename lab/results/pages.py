"""How every page of results begins, and the line that shows what a measurement is doing."""

import sys
import textwrap


def page_head(
    title: str, purpose: str, read_first: str = "[How it works](../how_it_works.md)"
) -> list[str]:
    """Return the lines of a page's title and of the quote that says what the page is for.

    >>> print("\\n".join(page_head("A title", "what saves cost")[:3]))
    # A title
    <BLANKLINE>
    > **What this is for**: what saves cost. **Read first**: [How it works](../how_it_works.md).
    """
    quote = f"**What this is for**: {purpose}. **Read first**: {read_first}."
    wrapped = textwrap.wrap(
        quote, 100, initial_indent="> ", subsequent_indent="> ", break_on_hyphens=False
    )
    return [f"# {title}", "", *wrapped, ""]


def show_progress(text: str, end: str = "") -> None:
    """Replace the terminal's last line by ``text``."""
    print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)
