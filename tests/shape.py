"""The shape of the package in numbers, read from the source: `python tests/shape.py [ROOT]` prints them.

`test_layers.py` holds the goals. A class's methods are those in its body, its attributes those that its methods set on
`self`; inherited ones are counted where they are written. A crossing is a private name of another file.
"""

import ast
import pathlib
import statistics
import sys

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def code_lines(node):
    """Lines of a function without its docstring."""
    doc = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


def defined(tree):
    """The names that a file defines: functions, classes, variables, and attributes set on self or cls."""
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value  # a name in __slots__


def classes(trees):
    """Yield (name, methods, attributes) of every class."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, FUNCTIONS)]
                inside = [part for method in methods for part in ast.walk(method)]
                stored = [
                    part for part in inside if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                ]
                names = {p.attr for p in stored if isinstance(p.value, ast.Name) and p.value.id == "self"}
                yield node.name, len(methods), len(names)


def crossings(trees):
    """Count the uses of a private name that the file does not define itself."""
    total = 0
    for tree in trees:
        own = set(defined(tree))
        names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        total += sum(is_private(name) and name not in own for name in names)
    return total


def measure(root):
    """Return the figures of the package in the repository at `root`, by name."""
    files = sorted((root / "numbabuf").rglob("*.py"))
    trees = [ast.parse(path.read_text()) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = sorted(code_lines(node) for node in nodes if isinstance(node, FUNCTIONS))
    lengths = [len(path.read_text().splitlines()) for path in files]
    notes = [
        a.annotation for node in nodes if isinstance(node, FUNCTIONS) for a in (*node.args.args, *node.args.kwonlyargs)
    ]
    notes += [node.returns for node in nodes if isinstance(node, FUNCTIONS)]
    notes = [ast.unparse(note) for note in notes if note is not None]
    found = list(classes(trees))
    return {
        "files": len(files),
        "lines": sum(lengths),
        "largest file": max(lengths),
        "functions, median": statistics.median(functions),
        "functions, 90 of 100": functions[len(functions) * 9 // 10],
        "methods of a class": max(methods for _, methods, _ in found),
        "attributes of a class": max(attributes for _, _, attributes in found),
        "private crossings": crossings(trees),
        "annotations that are Any, %": round(100 * sum(n in ("Any", "Any | None") for n in notes) / len(notes), 1),
    }


if __name__ == "__main__":
    for name, value in measure(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")).items():
        print(f"{name:<30} {value}")
