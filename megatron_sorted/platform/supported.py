"""The versions of Python and packages that this program supports; nothing else states them.

setup.py reads this file, so it imports nothing; the trainer, the doctor and tests of the pages read
it too. docs/megatron_versions.md lists what was run under which version.
"""

PYTHON = (3, 10)
"""The oldest Python."""
PYTHON_TRIED = ((3, 10), (3, 11), (3, 12), (3, 13))
"""The versions that were run, oldest first; docs/start.md says how much was."""
TORCH = (2, 6)
"""The oldest torch."""
TORCH_FOR_FSDP = (2, 8)
"""The oldest torch for --data-parallel fsdp."""
TORCH_TRIED = ("2.13.0", "2.14.1")
"""The versions of torch that were run: that of constraints.txt, the newest."""
TRANSFORMERS = (5,)
"""The oldest transformers, which conversion, evaluation and decoding use."""
TRANSFORMERS_TRIED = ("5.23.0", "5.24.0")
"""The versions of transformers that were run, as for torch."""
EMERGING_OPTIMIZERS = (0, 2)
"""The oldest emerging-optimizers, which Muon needs, with megatron-core 0.18 or newer."""
MEGATRON_CORE, MEGATRON_CORE_END = (0, 16, 1), (0, 20)
"""The oldest megatron-core, and the first version after the newest one."""
MEGATRON_CORE_TESTED = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""The versions that `make test-versions` runs, oldest first."""
VLLM, VLLM_END = (0, 28), (0, 33)
"""The oldest vLLM for the plug-in, and the first version after the newest one."""
VLLM_TESTED = ("0.28.0", "0.32.0")
"""The versions that `make test-vllm` runs, oldest first."""
LAST_FOR_OLDER_MEGATRON = "0.10.0"
"""The last release of this program that ran on megatron-core 0.12.1 to 0.15."""


def shown(version: tuple[int, ...]) -> str:
    """Return a version as text.

    >>> shown((0, 16, 1))
    '0.16.1'
    """
    return ".".join(map(str, version))


MEGATRON_CORE_RANGE = f">={shown(MEGATRON_CORE)},<{shown(MEGATRON_CORE_END)}"
"""The supported versions of megatron-core as a requirement of pip."""
VLLM_RANGE = f">={shown(VLLM)},<{shown(VLLM_END)}"
"""Likewise of vLLM."""
