"""Transformer Engine: whose it is, whether it works, and whether megatron-core is made for it."""

import importlib.metadata
from collections.abc import Sequence

from megatron_sorted.doctor.finding import Finding, fail, ok, warn
from megatron_sorted.doctor.probes import Probe
from megatron_sorted.platform.transformer_engine import REMOVE, InstalledEngine, why_refused

NAME = "Transformer Engine"


def required_versions(path: Sequence[str]) -> tuple[str, str]:
    """Return megatron-core's version and the versions of Transformer Engine that it asks for.

    Both are those of its installation, the second as in ">=2.9,<2.12". It is empty where the
    installation names none, as from 0.17 on; both are where there is no installation, as for a
    checkout.
    """
    from packaging.requirements import Requirement

    for distribution in importlib.metadata.distributions(name="megatron-core", path=list(path)):
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.name.replace("_", "-").lower() == "transformer-engine":
                return distribution.version, str(requirement.specifier)
        return distribution.version, ""
    return "", ""


def check_transformer_engine(
    probe: Probe | None, engine: InstalledEngine | None, device: str, path: Sequence[str]
) -> list[Finding]:
    """Check that Transformer Engine, which is used on GPUs if it is installed, works.

    Args:
        probe: The result of importing it; None if it is not installed.
        engine: Whose it is, by its files; None if it is not installed.
        device: The kind of device that runs use here.
        path: Folders to import from.
    """
    if refused := engine and why_refused(engine, device):
        return [fail(NAME, *refused)]
    if engine and engine.for_npus and device != "npu":
        value = f"{engine.folder} is the one for Ascend NPUs and does not count"
        remedy = f"{REMOVE}: Megatron imports it on every device."
        return [warn(NAME, value, remedy)]
    if probe is None:
        return [ok(NAME, "not installed (optional)")]
    if probe.facts is None:
        cause = "It was built for another torch: r" if "undefined symbol" in probe.error else "R"
        remedy = (
            f"{cause}einstall it (pip install --no-build-isolation transformer-engine[pytorch]), "
            "or pip uninstall transformer-engine: it is optional, and useless without a GPU."
        )
        return [fail(NAME, probe.error, remedy)]
    version = probe.facts["version"]
    if engine and engine.for_npus:
        return [warn(NAME, f"{version}, the one for Ascend NPUs", "It is untried (a trial).")]
    return [_check_version(version, path)]


def _check_version(version: str, path: Sequence[str]) -> Finding:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion

    megatron, bounds = required_versions(path)
    try:
        fits = SpecifierSet(bounds).contains(version, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        fits = False
    if fits:
        return ok(NAME, version)
    remedy = (
        f"megatron-core {megatron} was made for {bounds or 'a version with a number'}: pip install "
        f"'transformer-engine[pytorch]{bounds}', or use --transformer-impl local."
    )
    return warn(NAME, version, remedy)
