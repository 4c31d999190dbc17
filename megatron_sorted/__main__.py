"""``megatron-sorted COMMAND ...``, also ``python -m megatron_sorted COMMAND ...``."""

import sys
from difflib import get_close_matches
from typing import NoReturn

from megatron_sorted.command_line import start_command
from megatron_sorted.commands import COMMANDS, run

OVERVIEW = f"""usage: megatron-sorted COMMAND ...

Train, convert, evaluate and serve language models whose every chosen prefix of layers is a model.

{chr(10).join(f"  {name:10s} {does}" for name, does in COMMANDS.items())}

megatron-sorted COMMAND --help says more of each; megatron-sorted --version names the version.
Example: megatron-sorted train --config examples/quickstart.yaml"""


def main() -> NoReturn:
    """Run the command that the first word names."""
    start_command()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(OVERVIEW)
        sys.exit(0)
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        guess = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(COMMANDS)}."
        print(f"error: {name!r}: there is no such command. {guess}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"megatron-sorted {name}"]
    run(name)


if __name__ == "__main__":
    main()
