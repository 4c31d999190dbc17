"""The library that decodes on CPUs: its compiler, and the instructions that it would use."""

from collections.abc import Mapping

from megatron_sorted.decoding.native.compiler import (
    NativeError,
    compiler_version,
    find_compiler,
    instructions_for,
    own_targets,
)
from megatron_sorted.decoding.native.cpu import check_architecture
from megatron_sorted.decoding.native.library_cache import built_library, try_library, why_refused
from megatron_sorted.doctor.finding import Finding, ok, warn

NAME = "decoding on CPUs"
REMEDY = "Install g++ or clang++ (Debian: apt install g++), or name a compiler in CXX."


def check_native(
    environment: Mapping[str, str], has_device: bool, is_compiled: bool
) -> list[Finding]:
    """Check that the library can be compiled: the compiler is asked for its version and macros.

    Args:
        environment: The process's environment.
        has_device: Whether this host has a device that decodes instead.
        is_compiled: Whether to compile the library, as the first start of decoding does.
    """
    try:
        check_architecture()
        command = find_compiler(environment)
        version = compiler_version(command, environment)
        if is_compiled:
            with built_library(lambda text: None, environment) as library:
                used = f"compiled for {try_library(library, environment)}"
        elif reason := why_refused(environment):
            raise NativeError(reason)
        else:
            used = f"would be compiled for {instructions_for(command, own_targets(), environment)}"
    except NativeError as error:
        value = f"by torch, more slowly: {error}"
        return [ok(NAME, value) if has_device else warn(NAME, value, REMEDY)]
    return [ok(NAME, f"{used} by {' '.join(command)} ({version})")]
