# SPDX-License-Identifier: MIT
"""The typed stub tells of everything that the extension has, and of nothing else."""

import ast
import enum
import pathlib

import deep_ep
from deep_ep import _core

PACKAGE = pathlib.Path(deep_ep.__file__).parent


def names_of(body):
    """Name -> names inside it, of classes, functions and variables."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = set(names_of(node.body))
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = set()
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = set()
        elif isinstance(node, ast.Assign):
            found.update({target.id: set() for target in node.targets})
    return found


def test_2_the_stub_names_what_the_extension_has():
    stub = names_of(ast.parse((PACKAGE / "_core.pyi").read_text()).body)
    real = {name for name in dir(_core) if not name.startswith("__")} | {"__version__"}
    assert set(stub) == real, "run tools/make_stub.py"
    for name, members in stub.items():
        there = getattr(_core, name)
        if isinstance(there, type) and not issubclass(there, Exception):
            own = {member for member in vars(there) if not member.startswith("_")}
            if issubclass(there, enum.Enum):
                own -= {"name", "value"}
            assert {member for member in members if not member.startswith("_")} == own, name


def test_2_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
