"""Names of devices and of the libraries for them."""

from collections.abc import Mapping

DEVICES = ("auto", "cpu", "cuda", "npu")
OPTIONAL = ("torch_npu", "transformer_engine", "apex")
"""Libraries that are imported where they are installed, wanted or not."""


def library_versions(installed: Mapping[str, str]) -> dict[str, str]:
    """Returns the versions of the libraries for devices that are installed, of all installed distributions by name in small letters."""
    names = {"torch_npu": ("torch-npu", "torch_npu"), "transformer_engine": ("transformer-engine", "transformer_engine"), "apex": ("apex",)}
    return {name: installed[spelt] for name, spellings in names.items() for spelt in spellings if spelt in installed}
