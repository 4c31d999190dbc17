"""Stand-ins for the CANN libraries that torch_npu is linked with, compiled by gcc.

They define the symbols that the installed wheel needs: the functions of runtime.c and options.c,
and functions that return 0. No file of CANN is needed.
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
# names that torch_npu looks up while it runs, which its library holds as text
LOOKED_UP = re.compile(
    rb"\0((?:aclrt|aclmdl|aclop|aclprof|aclsys|acl[A-Z]|Hccl|Hcom|rt[A-Z]|Msprof)[A-Za-z0-9]*)(?=\0)"
)
DEFINITION = re.compile(r"^(?:int|size_t|const char \*) ?(acl\w+)\(", re.MULTILINE)


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, which is not imported.

    Raises:
        FileNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{name} is not installed for {sys.executable}: run `make test-npu`, which installs it"
            " beside the project's own packages"
        )
    return Path(spec.submodule_search_locations[0])


def _symbols(library: Path, which: str) -> set[tuple[str, str]]:
    """Return (kind, name) of a library's dynamic symbols."""
    output = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {
        (fields[-2], fields[-1].split("@")[0])
        for fields in map(str.split, output.splitlines())
        if len(fields) > 1
    }


def wanted_functions(package: Path, torch: Path) -> set[str]:
    """Return the names that torch_npu needs of CANN, when it is linked or later."""
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
    names |= {name.decode() for name in LOOKED_UP.findall(main.read_bytes())}
    return {
        name for name in names if not name.startswith("aclnn")
    }  # those are kernels, replaced in Python


def _compile(library: Path, source: str) -> None:
    """Write and compile a library."""
    source_file = library.with_suffix(".c")
    source_file.write_text(source)
    options = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *options, "-o", str(library), str(source_file)], check=True)


def build(into: Path) -> Path:
    """Return the folder below ``into`` with the stand-ins, after building them if necessary.

    It gets its name when it is complete, so that no process loads a library that another one is
    still writing.
    """
    package = package_folder("torch_npu")
    runtime, options = (HERE / "runtime.c").read_text(), (HERE / "options.c").read_text()
    version = (package / "version.py").read_text()
    sources = "".join((runtime, options, version, Path(__file__).read_text()))
    folder = into / hashlib.sha256(sources.encode()).hexdigest()[:12]
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
