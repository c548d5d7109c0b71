"""Who may import whom, read from the source without importing it.

A module of the package imports only modules named before it here; `_cuda` is the only door to CUDA; an
optional package is imported inside the function that needs it.
"""

import ast
import pathlib
import sys
import textwrap

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "numbabuf"

ORDER = (
    "errors checks files config _cuda spec buckets html interop stats progress demand kernels memory entry "
    "shelves ordering store ladder pool policies moves calibration turns tiered hierarchy slot sizes overflow "
    "staging arena lease graph service manager predictive factory nvtx report timeline plots testing ext traces "
    "planning pipeline info cli __main__"
).split()

CUDA = ("numba.cuda", "numba_cuda", "cuda")
REQUIRED = {"numba", "numpy", "numbabuf"} | sys.stdlib_module_names


def module_name(path):
    """Name of a file's module below the package: "pool", "_cuda.stream", "" for its own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module):
    """The module of ORDER that a module belongs to: "_cuda" for "_cuda.stream"."""
    return module.split(".")[0]


def is_type_checking(node):
    """Whether a statement is `if TYPE_CHECKING:`, which does not run."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree, package):
    """Every import that can run, as (dotted name, line, at module level).

    `from a.b import c` gives "a.b.c", which may be one name too long but never one too short. Relative names
    are made absolute from `package`, the dotted name of the package that the file is in.
    """

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parents = package.split(".")
                base = parents[: len(parents) - child.level + 1] if child.level else []
                base += child.module.split(".") if child.module else []
                yield from ((".".join([*base, alias.name]), child.lineno, top) for alias in child.names)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, top and not inside)

    return walk(tree, True)


def is_cuda(name):
    return any(name == root or name.startswith(root + ".") for root in CUDA)


def faults(source, module, package="numbabuf"):
    """What is wrong with the imports of one module, a line each."""
    found = []
    for name, line, top in imports(ast.parse(source), package):
        root, *rest = name.split(".")
        where = f"{module or '__init__'}:{line} imports {name}"
        if is_cuda(name) and layer(module) != "_cuda":
            found.append(f"{where}, and only _cuda may import CUDA")
        elif top and root not in REQUIRED and root != "cuda":
            found.append(f"{where} at its top; an optional package is imported where it is used")
        elif root == "numbabuf" and module and rest and rest[0] in ORDER:
            if layer(module) != rest[0] and ORDER.index(layer(module)) <= ORDER.index(rest[0]):
                found.append(f"{where}, which comes after it in the order of layers")
        elif root == "numbabuf" and module and top:
            found.append(f"{where}, which is no module of ORDER: the package itself, or one without its place")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) or "__init__" for path in FILES])
def test_imports_point_upwards(path):
    module = module_name(path)
    assert module == "" or layer(module) in ORDER, f"give {layer(module)} its place in ORDER"
    package = ".".join(["numbabuf", *path.relative_to(PACKAGE).parts[:-1]])
    found = faults(path.read_text(), module, package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("pool", "import numba.cuda", "only _cuda"),
        ("pool", "def f():\n    from numba import cuda", "only _cuda"),
        ("pool", "from cuda.core import Stream", "only _cuda"),
        ("pool", "import tqdm", "optional"),
        ("pool", "try:\n    import ml_dtypes\nexcept ImportError:\n    pass", "optional"),
        ("spec", "from numbabuf.pool import SimpleBufferPool", "order of layers"),
        ("spec", "from . import pool", "order of layers"),
        ("spec", "def f():\n    from .pool import SimpleBufferPool", "order of layers"),
        ("spec", "from numbabuf import SimpleBufferPool", "no module of ORDER"),
    ],
)
def test_a_wrong_import_is_found(module, source, complaint):
    (found,) = faults(source, module)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("pool", "numbabuf", "import numpy as np, threading\nfrom numba import types"),
        ("pool", "numbabuf", "from numbabuf import spec"),
        ("pool", "numbabuf", "from .spec import BufferSpec\nfrom . import _cuda\nfrom ._cuda import cuda"),
        ("_cuda.stream", "numbabuf._cuda", "from numba import cuda\nfrom . import address"),
        ("_cuda.stream", "numbabuf._cuda", "from ..errors import NumbabufError"),
        ("cli", "numbabuf", "def f():\n    import tqdm"),
        (
            "spec",
            "numbabuf",
            """
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from numbabuf.pool import SimpleBufferPool
            """,
        ),
    ],
)
def test_a_right_import_is_let_pass(module, package, source):
    assert faults(textwrap.dedent(source), module, package) == []
