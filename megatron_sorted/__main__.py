"""The program ``megatron-sorted COMMAND ...``, also ``python -m megatron_sorted COMMAND ...``."""

import sys
from typing import NoReturn

from megatron_sorted.command_line import run_main, start_command
from megatron_sorted.commands import COMMANDS, run
from megatron_sorted.settings.require import nearest

OVERVIEW = f"""usage: megatron-sorted COMMAND ...

Train, convert, evaluate and serve language models whose every chosen prefix of layers is a model.

{chr(10).join(f"  {name:10s} {purpose}" for name, purpose in COMMANDS.items())}

See megatron-sorted COMMAND --help for each; megatron-sorted --version prints the version.
Example: megatron-sorted train --config examples/quickstart.yaml"""


def main() -> NoReturn:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"megatron-sorted {name}"]
        run(name)
    start_command()
    run_main(lambda: show(name))


def show(name: str) -> int:
    """Print the list of commands, or that none has this name; return the exit status."""
    if name in ("-h", "--help"):
        print(OVERVIEW)
        return 0
    near = nearest(
        name, [*COMMANDS, "--help", "--version"], f"Choose one of {', '.join(COMMANDS)}."
    )
    print(f"error: {name!r}: there is no such command. {near}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
