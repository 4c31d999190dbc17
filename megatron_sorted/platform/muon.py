"""Whether the installed megatron-core and emerging-optimizers can build Muon."""

import importlib
import importlib.util

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.supported import EMERGING_OPTIMIZERS, shown
from megatron_sorted.platform.versions import INSTALL, megatron_version

PACKAGE = "emerging-optimizers"
INSTALL_PACKAGE = "pip install 'megatron_sorted[muon]' (on Python 3.12 or newer)"


def check_muon_is_there() -> None:
    """Check that megatron-core finds its Muon in the package emerging-optimizers.

    Raises:
        PlatformError: megatron-core has no list of such optimizers, or does not find the package.
    """
    optimizers = importlib.import_module("megatron.core.optimizer")
    if not hasattr(optimizers, "_EMERGING_OPTIMIZERS"):
        raise PlatformError(
            f"--optimizer muon: megatron-core {megatron_version()} builds Muon in an earlier way, "
            "which this program does not support; 0.18 has the one that it does. Install a newer "
            f"one on Python 3.12 or newer ({INSTALL}), or use --optimizer adam."
        )
    if optimizers.HAVE_EMERGING_OPTIMIZERS and "muon" in optimizers._EMERGING_OPTIMIZERS:
        return
    needed = f"the package {PACKAGE}, {shown(EMERGING_OPTIMIZERS)} or newer"
    raise PlatformError(
        f"--optimizer muon: megatron-core needs {needed}, for it, and {_what_is_wrong()}. "
        f"Install it: {INSTALL_PACKAGE}, or use --optimizer adam."
    )


def _what_is_wrong() -> str:
    module = PACKAGE.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        return "it is not installed"
    try:
        importlib.import_module(f"{module}.orthogonalized_optimizers")
    except ImportError as error:
        return f"its import fails: {error}"
    return "the one that is installed is older"
