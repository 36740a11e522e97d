"""Imports point down, those inside functions too, and go in no circle."""

import ast
import sys
from graphlib import TopologicalSorter

from system.files import ROOT

# A layer may import itself and those before it; training and preparing leave each other alone.
LAYERS = ["invert loss", "system", "sources weights", "data model toy", "evaluation"]
LAYERS += ["training preparing", "train_inpo evaluate pairs", "lab"]
BESIDE = {"training": "preparing", "preparing": "training"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
FILES = [*ROOT.glob("*.py"), *(file for name in LEVEL for file in ROOT.glob(f"{name}/*.py"))]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}


def imports(text: str) -> set[str]:
    """The modules that a program imports; "." before those that are named relatively."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{x.name}" for x in node.names} & MODULES.keys() or {module}
    return found


def test_imports_point_down_and_go_in_no_circle():
    graph = {name: imports(file.read_text()) for name, file in MODULES.items()}
    for name, found in graph.items():
        parts, level = {other.split(".")[0] for other in found}, LEVEL[name.split(".")[0]]
        assert not [part for part in parts if part == "" or LEVEL.get(part, 0) > level], name
        assert BESIDE.get(name.split(".")[0]) not in parts, name
        assert level or parts <= {"torch", *sys.stdlib_module_names}, name
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_root_shows_the_method_and_its_jobs():
    files = "data evaluate invert loss model pairs toy train_inpo".split()
    assert sorted(file.stem for file in ROOT.glob("*.py")) == files
