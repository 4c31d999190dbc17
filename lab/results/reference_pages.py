"""Reference pages of the documentation: settings, commands and public modules, from the code
itself.

``docs/conf.py`` calls ``write_pages`` before every build; nothing that it writes is kept in git.
"""

import contextlib
import io
from importlib import import_module
from pathlib import Path

from lab.results.pages import page_head
from megatron_sorted.commands import COMMANDS
from megatron_sorted.commands.convert import VERBS
from megatron_sorted.settings.field import flag_of
from megatron_sorted.settings.flags import default_text, field_groups
from megatron_sorted.settings.values import choices, field_types, is_list

PUBLIC_MODULES = {
    "The method": ("exits.depths", "exits.coefficients", "exits.selection"),
    "Settings": ("settings.load", "settings.layout", "planning.estimate"),
    "Data": ("data.batches",),
    "Training": (
        "model.chunk",
        "loss.deferred",
        "loss.linear_cross_entropy",
        "loss.distillation",
        "loss.taught_choice",
        "training.step.forward_step",
        "checkpoint.manifest",
    ),
    "Models on disk": (
        "conversion.open_model",
        "conversion.importing",
        "conversion.exporting",
        "exported.load",
    ),
    "Evaluation": ("evaluation.evaluate",),
    "Decoding and serving": (
        "decoding.strategies",
        "decoding.generate",
        "decoding.text_generator",
        "serving.api",
    ),
}
"""Title -> modules of the package whose public names are documented."""
START = "[Start on a laptop](../start.md)"


def help_of(command: str, verb: str | None = None) -> str:
    """Return the text that ``megatron-sorted COMMAND [VERB] --help`` prints."""
    module = import_module(f"megatron_sorted.commands.{command}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main([*([verb] if verb else []), "--help"])
    return printed.getvalue().strip()


def commands_page() -> str:
    """Return the page of all commands: the help of each, with that of its verbs."""
    lines = [
        *page_head("Commands", "every command and option, as `--help` prints them", START),
        "`megatron-sorted COMMAND`, or `python -m megatron_sorted COMMAND`. In a clone,"
        " `tools/*.py` and `pretrain_sorted.py` start the same commands.",
    ]
    for name, purpose in COMMANDS.items():
        lines += ["", f"## {name}", "", f"{purpose[0].upper()}{purpose[1:]}."]
        if name == "train":
            lines += ["", "Its options are [all settings](settings.md)."]
            continue
        lines += ["", "```text", help_of(name), "```"]
        for verb in VERBS if name == "convert" else ():
            lines += ["", f"### {name} {verb}", "", "```text", help_of(name, verb), "```"]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page of all settings, one table for each group."""
    lines = [
        *page_head("Settings", "every setting of a run", START),
        "Each setting is a flag of `megatron-sorted train` and, without its dashes in front, a "
        "key of the YAML file that `--config` names. Flags override the file. A switch `--x` has "
        "an opposite `--no-x`.",
    ]
    types = field_types()
    for title, fields in field_groups():
        lines += ["", f"## {title}", "", "| setting | default | meaning |", "|---|---|---|"]
        for field in fields:
            kind = types[field.name]
            values = (
                f" One of {', '.join(f'`{choice}`' for choice in choices(kind))}."
                if choices(kind)
                else ""
            )
            several = " Takes several values." if is_list(kind) else ""
            text = field.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
            lines.append(
                f"| `{flag_of(field.name)}` | `{default_text(field)}` | {text}{values}{several} |"
            )
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Return the page that documents the public modules from their docstrings."""
    lines = [
        *page_head(
            "Python API",
            "the modules that other programs may import",
            "[Architecture](../architecture.md)",
        ),
        "Names that are not listed here may change in any version.",
    ]
    for title, modules in PUBLIC_MODULES.items():
        lines += ["", f"## {title}"]
        for module in modules:
            name = f"megatron_sorted.{module}"
            lines += ["", f"### {name}", "", "```{eval-rst}", f".. automodule:: {name}", "```"]
    return "\n".join(lines) + "\n"


def write_pages(folder: Path) -> None:
    """Write the three pages into ``folder``; files whose content is unchanged keep their time."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"commands.md": commands_page(), "settings.md": settings_page(), "api.md": api_page()}
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
