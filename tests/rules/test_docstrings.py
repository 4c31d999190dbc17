"""Every public name has a docstring, and those of functions that communicate say so."""

import ast

import pytest

from tests.rules.sources import functions, name_of, program_files

DISTRIBUTED = {
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object"),
    *("all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier"),
    *("batch_isend_irecv", "broadcast", "broadcast_object_list", "destroy_process_group"),
    *("gather", "gather_object", "init_process_group", "irecv", "isend", "monitored_barrier"),
    *("new_group", "recv", "recv_object_list", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "send_object_list"),
}
"""Functions of torch.distributed that communicate with other ranks."""
MEGATRON = {
    "all_to_all_hp2sp",
    "all_to_all_sp2hp",
    "broadcast_data",
    "copy_to_tensor_model_parallel_region",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "initialize_model_parallel",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "reduce_scatter_to_tensor_parallel_region",
    "scatter_to_sequence_parallel_region",
    "scatter_to_tensor_model_parallel_region",
    "vocab_parallel_cross_entropy",
}
"""Functions of megatron-core that communicate with other ranks, forward or backward."""


def undocumented(source: str) -> list[str]:
    """Return the public functions, methods and classes without a docstring."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else ["module"]
    for node, around in functions(tree):
        public = all(not part.name.startswith("_") for part in [*around, node])
        inner = any(not isinstance(part, ast.ClassDef) for part in around)
        if public and not inner and not ast.get_docstring(node):
            missing.append(node.name)
    return missing


def silent_collectives(source: str) -> list[str]:
    """Return "function: call" for each collective call in a function without a ``Collective:``."""
    tree = ast.parse(source)
    modules, names = {"torch.distributed"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {
                alias.asname
                for alias in node.names
                if alias.name == "torch.distributed" and alias.asname
            }
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            modules |= {
                alias.asname or alias.name for alias in node.names if alias.name == "distributed"
            }
        if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed":
            names |= {
                alias.asname or alias.name for alias in node.names if alias.name in DISTRIBUTED
            }

    def communicates(call: ast.Call) -> bool:
        function = call.func
        if isinstance(function, ast.Name):
            return function.id in names | MEGATRON
        if isinstance(function, ast.Attribute):
            return (
                function.attr in DISTRIBUTED and ast.unparse(function.value) in modules
            ) or function.attr in MEGATRON
        return False

    silent = {}
    for node, around in functions(tree):
        documented = any(
            "Collective:" in (ast.get_docstring(part) or "")
            for part in [*around, node]
            if not isinstance(part, ast.ClassDef)
        )
        for call in ast.walk(node):
            if (
                isinstance(call, ast.Call)
                and communicates(call)
                and not isinstance(node, ast.ClassDef)
            ):
                # Functions come outermost first, so the innermost one remains.
                silent[call] = (documented, node.name)
    return [
        f"{name}: {ast.unparse(call.func)}"
        for call, (documented, name) in silent.items()
        if not documented
    ]


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(): pass\n", ["module", "f"]),
        (
            '"""M."""\nclass A:\n    """A."""\n    def g(self): pass\n    def _h(self): pass\n',
            ["g"],
        ),
        ('"""M."""\ndef f():\n    """F."""\n    def inner(): pass\n', []),
    ],
)
def test_missing_docstrings_are_reported(source, missing):
    assert undocumented(source) == missing


@pytest.mark.parametrize(
    ("source", "silent"),
    [
        (
            "import torch\ndef f(x):\n    torch.distributed.all_reduce(x)\n",
            ["f: torch.distributed.all_reduce"],
        ),
        (
            "import torch.distributed as dist\ndef f(x):\n    return lambda: dist.broadcast(x)\n",
            ["f: dist.broadcast"],
        ),
        (
            "from torch.distributed import barrier as wait\n"
            "class A:\n    def f(x):\n        wait()\n",
            ["f: wait"],
        ),
        (
            "def f(x):\n    return tensor_parallel.gather_from_tensor_model_parallel_region(x)\n",
            ["f: tensor_parallel.gather_from_tensor_model_parallel_region"],
        ),
        ("import torch\ndef f(x):\n    return torch.gather(x), torch.distributed.get_rank()\n", []),
        (
            'import torch\ndef f(x):\n    """X.\n\n    Collective: one.\n    """\n'
            "    torch.distributed.all_reduce(x)\n",
            [],
        ),
        (
            'from torch import distributed\ndef f(x):\n    """Collective: one."""\n'
            "    def g():\n        distributed.send(x)\n",
            [],
        ),
    ],
)
def test_silent_collectives_are_reported(source, silent):
    assert silent_collectives(source) == silent


def test_every_public_name_has_a_docstring():
    missing = {
        name_of(path): names
        for path in program_files()
        if (names := undocumented(path.read_text(encoding="utf-8")))
    }
    assert not missing


def test_every_function_that_communicates_says_so():
    silent = {
        name_of(path): calls
        for path in program_files()
        if (calls := silent_collectives(path.read_text(encoding="utf-8")))
    }
    assert not silent, "add a `Collective:` section: which group, how many calls, which size"


def repeated_texts(source: str) -> list[str]:
    """Return the texts that stand more than once at the top level of a module."""
    texts = [
        node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    return sorted({text for text in texts if texts.count(text) > 1})


def test_no_module_says_a_text_twice():
    assert repeated_texts('"""A."""\n\n"""A."""\nX = 1\n"""B."""\n') == ["A."]
    sources = {name_of(path): path.read_text(encoding="utf-8") for path in program_files()}
    assert [name for name, source in sources.items() if repeated_texts(source)] == []
