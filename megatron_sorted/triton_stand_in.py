"""The only modules of other packages that need triton, replaced where triton is missing.

From megatron-core 0.18 on, ``import megatron.core`` imports ``transformer/moe/paged_stash.py``,
which imports triton; but only CUDA builds of torch bring triton, and the package does not require
it (NVIDIA/Megatron-LM, pull request 6891). The module serves one option of mixtures of experts on
GPUs. Likewise every import of emerging-optimizers (Muon) imports its kernels of triton, which
Megatron does not use. A stand-in for all of triton would be worse: torch's compiler would find it
and fail in it.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "megatron.core.transformer.moe.paged_stash": "Megatron's moe_paged_stash",
    "emerging_optimizers.triton_kernels": "use_syrk",
}
"""{module: the option that needs it}."""


class _StandIn(ModuleType):
    """The stand-in of a module. Every public name in it is a function that refuses."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):  # Python asks every module for such names
            raise AttributeError(name)

        def refuse(*_arguments: object, **_options: object) -> None:
            raise RuntimeError(
                f"{self.__name__}.{name} needs triton, which is not installed. Install it, "
                f"or leave out {MODULES[self.__name__]}."
            )

        return refuse


class _StandInFinder(MetaPathFinder, Loader):
    """Finds a stand-in where Python is about to import its module and there is no triton."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MODULES or importlib.util.find_spec("triton") is not None:
            return None
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, _module: ModuleType) -> None:
        """Do nothing: the module is complete."""


def install_finder() -> None:
    """Make Python import the stand-ins where triton is missing. Calling it again does nothing."""
    if not any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _StandInFinder())
