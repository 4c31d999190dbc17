"""Builds stand-ins for the CANN libraries that torch_npu is linked with, by gcc, from the symbols that the installed wheel wants.

What the functions in runtime.c and options.c do not do, a function that returns 0 stands for. No file of CANN is needed.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME, COLLECTIVES = "libascendcl.so", "libhccl.so"
OTHERS = (
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libopapi.so",
    "libruntime.so",
)
# names that torch_npu looks up while it runs: they stand in its library as text
LOOKED_UP = re.compile(
    rb"\0((?:aclrt|aclmdl|aclop|aclprof|aclsys|acl[A-Z]|Hccl|Hcom|rt[A-Z]|Msprof)[A-Za-z0-9]*)(?=\0)"
)
DEFINITION = re.compile(r"^(?:int|size_t|const char \*) ?(acl\w+)\(", re.MULTILINE)


def package_folder(name: str) -> Path:
    """Returns the folder of an installed package, which is not imported.

    Raises:
        FileNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{name} is not installed for {sys.executable}: run `make test-npu`, which installs it beside the "
            "project's own packages"
        )
    return Path(spec.submodule_search_locations[0])


def _symbols(library: Path, which: str) -> set[tuple[str, str]]:
    """Returns (kind, name) of a library's dynamic symbols."""
    said = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {
        (words[-2], words[-1].split("@")[0])
        for words in map(str.split, said.splitlines())
        if len(words) > 1
    }


def wanted_functions(package: Path, torch: Path) -> set[str]:
    """Returns the names that torch_npu leaves to CANN: those undefined when it is linked, and those it looks up later."""
    main = package / "lib" / "libtorch_npu.so"
    parts = [
        main,
        package / "lib" / "libtensorpipe.so",
        package / "lib" / "libnpu_profiler.so",
        *package.glob("_C.*.so"),
    ]
    linked = subprocess.run(["ldd", str(main)], capture_output=True, text=True, check=True).stdout
    system = [Path(word) for word in linked.split() if word.startswith("/") and Path(word).exists()]
    defined = {
        name
        for library in [*torch.glob("lib/*.so*"), *parts, *system]
        for _, name in _symbols(library, "--defined-only")
    }
    undefined = {
        name
        for library in parts
        for kind, name in _symbols(library, "--undefined-only")
        if kind == "U"
    }
    names = {name for name in undefined - defined if not name.startswith(("Py", "_Py", "_Z"))}
    names |= {found.decode() for found in LOOKED_UP.findall(main.read_bytes())}
    return {name for name in names if not name.startswith("aclnn")}  # kernels: replaced in Python


def _compile(library: Path, source: str) -> None:
    """Writes and compiles a library."""
    source_file = library.with_suffix(".c")
    source_file.write_text(source)
    options = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *options, "-o", str(library), str(source_file)], check=True)


def build(into: Path) -> Path:
    """Returns the folder below ``into`` with the stand-ins for the installed torch_npu, made now unless it is there.

    It gets its name when it is complete, so that no process loads a library that another one is still writing.
    """
    package = package_folder("torch_npu")
    runtime, options = (HERE / "runtime.c").read_text(), (HERE / "options.c").read_text()
    version = (package / "version.py").read_text()
    folder = (
        into
        / hashlib.sha256(
            "".join((runtime, options, version, Path(__file__).read_text())).encode()
        ).hexdigest()[:12]
    )
    if folder.exists():
        return folder
    into.mkdir(parents=True, exist_ok=True)
    names = wanted_functions(package, package_folder("torch"))
    written = set(DEFINITION.findall(runtime)) | set(DEFINITION.findall(options))
    collective = {name for name in names if name.startswith(("Hccl", "Hcom"))}

    def empty(of: set[str]) -> str:
        return "".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(of))

    rest = empty(names - written - collective)
    with tempfile.TemporaryDirectory(dir=into, ignore_cleanup_errors=True) as making:
        _compile(Path(making) / RUNTIME, runtime + options + rest)
        _compile(Path(making) / COLLECTIVES, empty(collective))
        for name in OTHERS:
            _compile(Path(making) / name, options + rest)
        try:
            os.rename(making, folder)
        except OSError:
            if not folder.exists():  # or another process was first
                raise
    return folder
