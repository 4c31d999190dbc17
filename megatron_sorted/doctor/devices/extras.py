"""Transformer Engine and Apex: not needed, but in the way when they are broken, since megatron-core imports what it finds."""

from collections.abc import Mapping

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine
from megatron_sorted.doctor.packages import numbers_of
from megatron_sorted.doctor.probes import Probe

# megatron-core 0.16.1 names these bounds in its package's requirements
OLDEST_ENGINE, FIRST_UNTRIED_ENGINE = (2, 9), (2, 12)


def check_transformer_engine(probe: Probe | None, num_gpus: int) -> list[Finding]:
    """Return whether Transformer Engine, if installed, can be used by this megatron-core."""
    if probe is None:
        return [fine("Transformer Engine", "not installed (optional)")]
    if probe.facts is None:
        if not num_gpus:
            return [
                broken(
                    "Transformer Engine",
                    probe.error,
                    "It needs a GPU: pip uninstall transformer-engine "
                    "transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13.",
                )
            ]
        return [
            broken(
                "Transformer Engine",
                probe.error,
                _rebuild(probe.error, "transformer-engine[pytorch]"),
            )
        ]
    version = probe.facts["version"]
    if numbers_of(version)[:2] < OLDEST_ENGINE or numbers_of(version)[:2] >= FIRST_UNTRIED_ENGINE:
        return [
            doubtful(
                "Transformer Engine",
                version,
                "megatron-core 0.16.1 was made for 2.9 to 2.11: "
                "pip install 'transformer-engine[pytorch]>=2.9,<2.12', or use --transformer-impl local.",
            )
        ]
    return [fine("Transformer Engine", version)]


def check_apex(probe: Probe | None, installed: Mapping[str, str]) -> list[Finding]:
    """Return whether Apex, if installed, is NVIDIA's, whole, and built for this torch."""
    if probe is None:
        return [fine("Apex", "not installed (optional)")]
    if probe.facts is None:
        if "pyramid" in probe.error.lower() or installed.get("apex", "").endswith("dev"):
            return [
                broken(
                    "Apex", "the package of this name on PyPI is not NVIDIA's", "pip uninstall apex"
                )
            ]
        return [broken("Apex", probe.error, _rebuild(probe.error, "apex"))]
    missing = probe.facts["missing"]
    if any("undefined symbol" in name or "cannot open shared object" in name for name in missing):
        return [broken("Apex", missing[0], _rebuild(missing[0], "apex"))]
    if missing:
        return [
            doubtful(
                "Apex",
                f"built without {', '.join(name.split()[0] for name in missing)}",
                "Build it with --cpp_ext and --cuda_ext, or pip uninstall apex; torch's own kernels are taken then.",
            )
        ]
    return [fine("Apex", probe.facts["version"])]


def _rebuild(error: str, package: str) -> str:
    remove = package.split("[")[0]
    if "undefined symbol" in error:
        return f"It was built for another torch: build it anew (pip install --no-build-isolation {package}), or pip uninstall {remove}."
    return f"Install it anew (pip install --no-build-isolation {package}), or pip uninstall {remove}: it is optional."
