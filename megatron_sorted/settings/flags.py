"""The command line of a run: one flag per field of `Settings`, built from the fields themselves."""

import argparse
import dataclasses
from typing import Any, NoReturn, get_args

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.field import flag_of
from megatron_sorted.settings.require import nearest
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.spellings import MEGATRON_NAMES, Given, in_our_names
from megatron_sorted.settings.values import choices, convert, field_types, is_list, is_optional

SEE_HELP = "See --help for all settings."


def field_groups() -> list[tuple[str, list[dataclasses.Field]]]:
    """Return (title, fields) of every group of settings, in the order of the fields."""
    # the first base's fields come last in a dataclass with several bases
    return [
        ((base.__doc__ or "").splitlines()[0].rstrip("."), list(dataclasses.fields(base)))
        for base in reversed(Settings.__bases__)
    ]


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises `SettingsError` at a mistake instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message[:1].upper()}{message[1:]}. {SEE_HELP}")


class _Switch(argparse.Action):
    """A flag without a value: its first name means true, its second false.

    argparse's own takes every name that starts with ``--no-`` for false, also that of the field
    ``no_load_optim``.
    """

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Build a parser with one flag per field, in groups.

    Flags that are not given are absent from its result.
    """
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config RUN.YAML] [--setting VALUE ...]",
        description=(
            "Settings of a run. Each is a flag and, without its dashes in front, a key of the "
            "YAML file."
        ),
        epilog="example: %(prog)s --config examples/quickstart.yaml",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="RUN.YAML",
        help="YAML file, one `name: value` a line; flags override it.",
    )
    parser.add_argument(
        "--print-settings",
        action="store_true",
        help="Print the resolved run as YAML that --config can read, and stop.",
    )
    for title, fields in field_groups():
        group = parser.add_argument_group(title)
        for field in fields:
            _add_flag(group, field)
    group = parser.add_argument_group("Megatron-LM's names of some settings")
    for theirs, ours in MEGATRON_NAMES.items():
        _add_flag(group, Settings.__dataclass_fields__[ours], theirs)
    return parser


def default_text(field: dataclasses.Field) -> str:
    """Return a field's default as help and the reference page show it: "none", "true", "empty"."""
    default = field.default
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "empty"
    text = str(default)
    return text.lower() if text in ("None", "True", "False") else text or "empty"


def _add_flag(
    group: argparse._ArgumentGroup, field: dataclasses.Field, theirs: str | None = None
) -> None:
    """Add the flag of a field, or the one of Megatron-LM's name for it."""
    name = theirs or field.name
    kind = field_types()[field.name]
    element_types = (
        [part for part in get_args(kind) if part is not type(None)]
        if is_optional(kind) or is_list(kind)
        else [kind]
    )
    # argparse reads % as formatting
    text = f"{field.metadata['help']} (default: {default_text(field)})".replace("%", "%%")
    if theirs:
        text = f"The same as {flag_of(field.name)}."
    options: dict[str, Any] = {"dest": name, "help": text}
    if bool in (kind, *element_types):
        opposite = name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"
        group.add_argument(flag_of(name), flag_of(opposite), action=_Switch, nargs=0, **options)
        return
    if choices(kind):
        options["metavar"] = "{" + ",".join(choices(kind)) + "}"
    else:
        options["metavar"] = "N" if element_types[0] in (int, float) else "TEXT"
    if is_list(kind):
        options["nargs"] = "*"
    group.add_argument(flag_of(name), **options)


def known_flags() -> list[str]:
    """Return every flag of a run."""
    return [flag for action in build_parser()._actions for flag in action.option_strings]


def parse_flags(argv: list[str]) -> tuple[str | None, bool, dict[str, Any]]:
    """Return (path of the YAML file, whether to print the run, values of the given fields).

    Raises:
        SettingsError: A flag is unknown or has no value, or a value has the wrong type.
    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        argument = unknown[0].split("=")[0]
        if not argument.startswith("-"):
            raise SettingsError(
                f"{argument!r}: a value without a flag. Write `--name value`; see --help for all "
                "settings."
            )
        raise SettingsError(
            f"{argument}: there is no such flag. {nearest(argument, known_flags(), SEE_HELP)}"
        )
    values = vars(given)
    configs = values.pop("config", [])
    if len(configs) > 1:
        raise SettingsError(
            f"--config: given {len(configs)} times ({', '.join(configs)}). Give one file; flags "
            "override it."
        )
    print_settings = values.pop("print_settings", False)
    given = in_our_names(Given(name, value, flag_of(name)) for name, value in values.items())
    converted = {one.name: convert(one.name, one.value, one.source, strict=False) for one in given}
    return (configs[0] if configs else None), print_settings, converted
