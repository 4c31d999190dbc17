"""Simulated NPUs for every program that imports torch_npu.

Python runs this file when it starts, if its folder is on PYTHONPATH.
"""

import importlib.abc
import importlib.machinery
import os
import sys


class _AfterTorchNpu(importlib.abc.MetaPathFinder):
    """A finder that imports torch_npu and then installs the simulation."""

    def find_spec(self, name, path=None, target=None):
        """Return the spec of torch_npu with a loader that installs the simulation, or None."""
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_and_simulate(module):
            load(module)
            from tests.support.npu_simulation.collectives import gloo_as_hccl
            from tests.support.npu_simulation.kernels import replace_kernels

            gloo_as_hccl()
            replace_kernels()

        spec.loader.exec_module = load_and_simulate
        return spec


if os.environ.get("SIMULATED_NPUS"):
    sys.meta_path.insert(0, _AfterTorchNpu())
