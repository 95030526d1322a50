"""The rooms of the house: arrows point one way, files and functions stay small."""

import ast
import re
from pathlib import Path

import pytest
from warm import ROOT

FLOORS = [  # a room imports only from rooms below it; neighbours on a floor leave each other alone
    ("errors", "settings"),
    ("runtime",),
    ("storage",),
    ("pruning", "data"),
    ("training", "measuring"),
    ("reports",),
    ("cli", "workflows", "api"),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ALLOWED = {  # private names that tests may use, and whose they are
    *("_make_layer", "_make_denseblock", "_make_transition", "_initialize_weights"),  # the original
    "_version",  # PyTorch counts the writes to a tensor there alone
    *("_asdict", "_replace"),  # of named tuples, for all
}
NAMES_NETWORKS = {"storage", "workflows"}  # the rooms that turn names into networks
SOURCES = sorted((ROOT / "slimming").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py")) + sorted((ROOT / "mask-impl").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
CODE = SOURCES + SCRIPTS + sorted((ROOT / "models").glob("*.py"))


def name_of(path: Path) -> str:
    """slimming/pruning/proof.py -> slimming.pruning.proof"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, in functions too; relative ones by their whole name."""
    found, package = set(), path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


MODULES = {name_of(path): path for path in SOURCES}


def test_models_import_nothing_of_the_library():
    for path in (ROOT / "models").glob("*.py"):
        assert not any(module.partition(".")[0] == "slimming" for module in imports(path)), path


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_room_imports_only_what_is_below_it(path):
    room = room_of(name_of(path))
    for module in imports(path):
        if module.partition(".")[0] == "models":
            assert room in NAMES_NETWORKS, f"{path} imports {module}"
        other = room_of(module) if module.startswith("slimming.") else room
        if room and other != room and other in FLOOR:
            assert FLOOR[other] < FLOOR[room], f"{path} imports {module}"


def test_no_import_goes_in_a_circle():
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    done = set()

    def visit(name, behind):
        assert name not in behind, " -> ".join([*behind, name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*behind, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_command_line_knows_argparse(path):
    assert room_of(name_of(path)) == "cli" or "argparse" not in imports(path)


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_files_classes_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (120 if path in SCRIPTS else 300)
    for node in ast.walk(ast.parse(text)):
        lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.ClassDef):
            assert lines <= 150, f"{node.name} has {lines} lines"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_function_says_its_types(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [
                a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
            ]
            assert not bare, f"{node.name}({', '.join(bare)})"
            assert node.returns or node.name == "__init__", f"{node.name} -> ?"


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_imports_another(path):
    """What several need stands in conftest.py and warm.py."""
    assert not any(module.startswith("test_") for module in imports(path))


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_uses_or_patches_a_private_name(path):
    """But those of its own objects, and ALLOWED."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") != "self":
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").endswith("attr"):
            strings = [a.value for a in node.args if isinstance(a, ast.Constant)]
            used |= {str(value).rpartition(".")[2] for value in strings}
    assert not {n for n in used - ALLOWED if n.startswith("_") and not n.startswith("__")}


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_a_command_line_is_one_string(path):
    """Not a word a line, as the formatter writes a list of them that ends with a comma."""
    flag = r'^ *"-[^" ]*",\n'
    assert not re.search(f"{flag}(.*\n)?{flag}", path.read_text(encoding="utf-8"), re.MULTILINE)
