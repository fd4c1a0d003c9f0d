"""Imports between modules, also those for type checkers and within functions, form no circle; rooms do not look up."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ROOMS = ("flatlora", "data", "eval", "scripts")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for room in ROOMS for path in sorted((PROJECT / room).rglob("*.py"))}


def imported(source: str, known: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # a module of a package, or a name in a module
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in names]
        else:
            continue
        yield from known.intersection(names)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {name: set(imported(path.read_text(), set(MODULES))) - {name} for name, path in MODULES.items()}


def test_no_module_imports_itself_through_others(graph):
    order = list(TopologicalSorter(graph).static_order())  # a CycleError names the modules
    assert sorted(order) == sorted(MODULES)


def test_a_circle_is_found():
    graph = {"a": set(imported("if TYPE_CHECKING:\n    from b import c", {"b"})), "b": {"a"}}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_rooms_import_only_lower_rooms(graph):
    upwards = {
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if ROOMS.index(target.split(".")[0]) > ROOMS.index(name.split(".")[0])
    }
    assert not upwards
