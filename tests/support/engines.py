"""Stand-ins for the packages ``transformer_engine`` of NVIDIA and of Ascend, as files alone."""

from pathlib import Path


def write_engine(site: Path, *, for_npus: bool, nvidia_part: bool = False) -> Path:
    """Write a package ``transformer_engine`` into ``site`` and return its folder.

    Args:
        site: The folder, to be put on the path.
        for_npus: Whether it is TransformerEngineNPU.
        nvidia_part: Whether NVIDIA's distribution for torch is installed there.
    """
    folder = site / "transformer_engine"
    (folder / "pytorch").mkdir(parents=True)
    whose = "Huawei Technologies Co., Ltd." if for_npus else "NVIDIA CORPORATION & AFFILIATES."
    text = f'# Copyright (c) 2026, {whose}\n__version__ = "2.13.0"\nfrom . import pytorch\n'
    (folder / "__init__.py").write_text(text)
    (folder / "pytorch" / "__init__.py").touch()
    if nvidia_part:
        write_distribution(site, "transformer_engine_torch", "2.9.0")
    return folder


def write_distribution(site: Path, name: str, version: str, *lines: str) -> None:
    """Write an installation's metadata into ``site``, with more ``lines``."""
    information = site / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (information / "METADATA").write_text(head + "".join(f"{line}\n" for line in lines))
