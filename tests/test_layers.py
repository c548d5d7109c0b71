"""Which room may import which, read from the source without importing it.

`_cuda` is the only door to CUDA; an optional package is imported inside the function that needs it.
"""

import ast
import graphlib
import pathlib
import re
import sys
import textwrap

import pytest
import shape

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "numbabuf"

BASE = {"errors", "checks", "config", "files", "resource"}
ROOMS = {
    "errors": set(),
    "checks": {"errors"},
    "config": {"errors", "checks"},
    "files": {"errors", "checks"},
    "resource": set(),
    "_cuda": BASE - {"files"},
    "pool": BASE - {"files"} | {"_cuda"},
    "tiers": BASE - {"files"} | {"_cuda", "pool"},
    "demand": BASE,
    "step": BASE - {"files"} | {"_cuda", "pool", "demand"},
    "predict": BASE | {"_cuda", "pool", "tiers", "demand", "step"},
    "view": BASE | {"_cuda", "pool", "tiers", "demand", "step", "predict"},
    "tools": BASE | {"_cuda", "pool", "tiers", "demand", "step", "predict", "view"},
    "ext": BASE | {"_cuda", "pool", "tiers", "demand", "step", "predict", "view"},
    "testing": BASE | {"_cuda", "pool"},
    "__main__": {"tools"},
}
"""Room -> the rooms that it may import. Tiers and step meet in predict's factory alone."""
NAMES = set("buckets info nvtx planning plots policies progress report stats timeline traces".split())
"""Modules of one import each, which keep a public name where users look for it."""
FACTORY = "predict.factory"

CUDA = ("numba.cuda", "numba_cuda", "cuda")
REQUIRED = {"numba", "llvmlite", "numpy", "numbabuf"} | sys.stdlib_module_names


def module_name(path):
    """Name of a file's module below the package: "pool", "_cuda.stream", "" for its own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    """The room that a module belongs to: "_cuda" for "_cuda.stream"."""
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
        if is_cuda(name) and room(module) != "_cuda":
            found.append(f"{where}, and only _cuda may import CUDA")
        elif top and root not in REQUIRED and root != "cuda":
            found.append(f"{where} at its top; an optional package is imported where it is used")
        elif root == "numbabuf" and module and module not in NAMES:
            theirs = rest[0] if rest else ""
            if theirs not in ROOMS:
                found.append(f"{where}, which belongs to no room")
            elif theirs == room(module):
                pass
            elif theirs not in ROOMS[room(module)]:
                found.append(f"{where}, and {room(module)} may not import {theirs}")
            elif theirs == "tiers" and room(module) == "predict" and module != FACTORY:
                found.append(f"{where}, and in predict only {FACTORY} may import tiers")
    return found


def module_of(name, modules):
    """The module that an imported dotted name means: "pool.pool" for "numbabuf.pool.pool.SimpleBufferPool"."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) or "__init__" for path in FILES])
def test_imports_keep_to_the_rooms(path):
    module = module_name(path)
    assert module == "" or room(module) in {*ROOMS, *NAMES}, f"give {room(module)} its place in ROOMS"
    package = ".".join(["numbabuf", *path.relative_to(PACKAGE).parts[:-1]])
    found = faults(path.read_text(), module, package)
    assert not found, "\n".join(found)


def test_no_modules_import_each_other():
    modules = {module_name(path): path for path in FILES}
    edges = {}
    for module, path in modules.items():
        package = ".".join(["numbabuf", *path.relative_to(PACKAGE).parts[:-1]])
        names = [name for name, _, _ in imports(ast.parse(path.read_text()), package) if name.startswith("numbabuf")]
        edges[module] = {module_of(name, modules) for name in names} - {module, ""}
    order = graphlib.TopologicalSorter(edges)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("pool.pool", "import numba.cuda", "only _cuda"),
        ("pool.pool", "def f():\n    from numba import cuda", "only _cuda"),
        ("pool.pool", "from cuda.core import Stream", "only _cuda"),
        ("pool.pool", "import tqdm", "optional"),
        ("pool.pool", "try:\n    import ml_dtypes\nexcept ImportError:\n    pass", "optional"),
        ("pool.spec", "from numbabuf.step.manager import InputBufferManager", "may not import step"),
        ("pool.spec", "from ..tiers import pool", "may not import tiers"),
        ("demand.model", "def f():\n    from ..pool import SimpleBufferPool", "may not import pool"),
        ("predict.manager", "from ..tiers.pool import HierarchicalBufferPool", "only predict.factory"),
        ("pool.spec", "from numbabuf import SimpleBufferPool", "belongs to no room"),
    ],
)
def test_a_wrong_import_is_found(module, source, complaint):
    (found,) = faults(source, module, f"numbabuf.{room(module)}")
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pool.pool", "import numpy as np, threading\nfrom numba import types"),
        ("pool.pool", "from numbabuf.pool import spec"),
        ("pool.pool", "from .spec import BufferSpec\nfrom .. import _cuda\nfrom .._cuda import cuda"),
        ("_cuda.stream", "from numba import cuda\nfrom . import address"),
        ("_cuda.stream", "from ..errors import NumbabufError"),
        ("predict.factory", "from ..tiers.pool import HierarchicalBufferPool"),
        ("tools.cli", "def f():\n    import tqdm"),
        (
            "pool.spec",
            """
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from numbabuf.step.manager import InputBufferManager
            """,
        ),
    ],
)
def test_a_right_import_is_let_pass(module, source):
    assert faults(textwrap.dedent(source), module, f"numbabuf.{room(module)}") == []


FACADES = {"PredictiveBufferManager"}
"""Classes that may derive from a concrete class of the package: the manager that predicts is the manager."""


def base_names(node):
    """The names of a class's bases, without modules and type arguments."""
    plain = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return [base.attr if isinstance(base, ast.Attribute) else ast.unparse(base) for base in plain]


def is_abstract(node):
    """Whether a class is there to be derived from: a Protocol, an ABC, or one with an abstract method in its body."""
    marks = [mark for part in node.body if isinstance(part, ast.FunctionDef) for mark in part.decorator_list]
    return bool({"ABC", "Protocol"}.intersection(base_names(node))) or any(
        ast.unparse(mark).split(".")[-1] == "abstractmethod" for mark in marks
    )


def is_value(node):
    """Whether a class is a frozen dataclass: it holds nothing that a class derived from it could share."""
    return any("frozen=True" in ast.unparse(mark) for mark in node.decorator_list)


def wrong_bases(sources):
    """The classes in some sources that derive from a concrete class in them, a line each.

    Concrete is what is neither abstract nor a mixin without state (`Shown`, empty slots). What derives from an
    exception may derive from another, and a frozen dataclass from one: it adds fields. A base is looked for by its
    name, first in the source itself.
    """
    files = [[node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)] for source in sources]
    everywhere = {node.name: node for nodes in files for node in nodes}

    def is_error(name):
        return name == "Exception" or (name in everywhere and any(map(is_error, base_names(everywhere[name]))))

    def may_be_base(base, of):
        return base.name == "Shown" or is_abstract(base) or is_error(base.name) or (is_value(base) and is_value(of))

    found = []
    for nodes in files:
        named = everywhere | {node.name: node for node in nodes}
        for node in nodes:
            bases = [named[name] for name in base_names(node) if name in named]
            wrong = [base.name for base in bases if node.name not in FACADES and not may_be_base(base, node)]
            found += [f"{node.name} derives from {name}, which is concrete" for name in wrong]
    return found


def test_no_class_derives_from_a_concrete_one():
    assert wrong_bases([path.read_text() for path in FILES]) == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("class A: pass\nclass B(A): pass", ["B"]),
        ("class A: pass\nclass B(m.A): pass", ["B"]),
        ("class A(Generic[T]): pass\nclass B(A[int]): pass", ["B"]),
        ("class A(ABC): pass\nclass B(A): pass\nclass C(B): pass", ["C"]),
        ("class A:\n    @abstractmethod\n    def f(self): ...\nclass B(A): pass", []),
        ("class A(Protocol): pass\nclass B(A): pass", []),
        ("class A(Exception): pass\nclass B(A): pass\nclass C(B): pass", []),
        ("@dataclass(frozen=True)\nclass A: pass\n@dataclass(frozen=True)\nclass B(A): pass\nclass C(A): pass", ["C"]),
        ("class A: pass\nclass PredictiveBufferManager(A): pass", []),
    ],
)
def test_a_concrete_base_is_found(source, wrong):
    assert [line.split()[0] for line in wrong_bases([source])] == wrong


def test_the_map_names_files_that_are_there():
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`((?:numbabuf|tests|\w+)/[\w/]+\.py)`", text))
    assert len(named) >= 15
    missing = [name for name in named if not ((PACKAGE / name).exists() or (PACKAGE.parent / name).exists())]
    assert not missing
    assert not [room for room in {name.split(".")[0] for name in ROOMS} - {"__main__"} if room not in text]


def test_nothing_in_the_package_grows_beyond_its_goal():
    found = shape.measure(PACKAGE.parent)
    goals = {
        "largest file": 650,
        "functions, 90 of 100": 17,
        "methods of a class": 30,
        "attributes of a class": 16,
        "annotations that are Any, %": 5,
    }
    assert {name: found[name] for name in goals if found[name] > goals[name]} == {}
