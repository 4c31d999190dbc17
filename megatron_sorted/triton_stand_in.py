"""Megatron's only module that needs triton, replaced where triton is missing.

From megatron-core 0.18 on, ``import megatron.core`` imports ``transformer/moe/paged_stash.py``,
which imports triton; but only CUDA builds of torch bring triton, and the package does not require
it (NVIDIA/Megatron-LM, pull request 6891). The module serves one option of mixtures of experts on
GPUs. A stand-in for all of triton would be worse: torch's compiler would find it and fail in it.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULE = "megatron.core.transformer.moe.paged_stash"


class _PagedStash(ModuleType):
    """The stand-in. Every public name in it is a function that refuses."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):  # Python asks every module for such names
            raise AttributeError(name)

        def refuse(*_arguments: object, **_options: object) -> None:
            raise RuntimeError(
                f"{MODULE}.{name} needs triton, which is not installed. Install it, or leave out "
                "Megatron's moe_paged_stash."
            )

        return refuse


class _StandInFinder(MetaPathFinder, Loader):
    """Finds the stand-in where Python is about to import the module and there is no triton."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE or importlib.util.find_spec("triton") is not None:
            return None
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _PagedStash(spec.name)

    def exec_module(self, _module: ModuleType) -> None:
        """Do nothing: the module is complete."""


def install_finder() -> None:
    """Make Python import the stand-in where triton is missing. Calling it again does nothing."""
    if not any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _StandInFinder())
