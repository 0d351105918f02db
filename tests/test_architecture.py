"""The rules of import, as docs/architecture.md says them."""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "detachnet"
GROUND = {
    "errors",
    "text",
    "facts",
    "fields",
    "hub",
    "storage",
    "machine",
    "ranks",
    "memory",
    "progress",
    "zoo",
    "models",
    "losses",
    "__init__",
}
MIDDLE = {"evaluation"}
MAY = {
    "ground": {"ground"},
    "data": {"ground", "data"},
    "surgery": {"ground", "surgery"},
    "checkpoint": {"ground", "surgery", "checkpoint"},
    "middle": {"ground", "data", "surgery", "middle"},
    "training": {"ground", "data", "surgery", "checkpoint", "middle", "training"},
    "deploy": {"ground", "data", "surgery", "checkpoint", "middle", "deploy"},
    "selection": {"ground", "data", "surgery", "checkpoint", "middle", "training", "deploy", "selection"},
    "report": {"ground", "data", "surgery", "checkpoint", "middle", "training", "deploy", "selection", "report"},
}


def wing(module: str) -> str:
    first = module.partition(".")[0]
    return "ground" if first in GROUND else "middle" if first in MIDDLE else first


def modules() -> dict[str, ast.Module]:
    files = [path for path in PACKAGE.rglob("*.py") if "embedded" not in path.parts]
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}
    return {name: ast.parse(path.read_text()) for name, path in names.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("detachnet."):
            name = str(node.module).removeprefix("detachnet.")
            is_folder = (PACKAGE / name.replace(".", "/")).is_dir()
            yield from (f"{name}.{alias.name}" for alias in node.names) if is_folder else [name]


@pytest.mark.slow
def test_imports_go_down() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in imports(tree)
        if wing(other) not in MAY[wing(name)]
    ]
    assert not wrong


@pytest.mark.slow
def test_every_file_is_in_a_wing_or_on_the_ground() -> None:
    assert {wing(name) for name in modules()} == set(MAY)


def as_one(module: str) -> str:
    """A package inside a wing counts as one module: it has a floor of its own."""
    return module if module.count(".") < 2 else module.rpartition(".")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name_of", [str, as_one])
def test_no_circles(name_of: Callable[[str], str]) -> None:
    """Of imports at the top of files."""
    left: dict[str, set[str]] = {}
    for module, tree in modules().items():
        others = {other for node in tree.body if isinstance(node, ast.ImportFrom) for other in imports(node)}
        left.setdefault(name_of(module), set()).update({name_of(other) for other in others} - {name_of(module)})
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_wings_list_their_files() -> None:
    for folder in (path.parent for path in PACKAGE.glob("*/**/__init__.py") if path.parent.name != "embedded"):
        said = (folder / "__init__.py").read_text()
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert [name for name in sorted(files) if name not in said] == [], folder.name


def test_no_test_imports_another() -> None:
    tests = Path(__file__).parent
    lines = [(path, line) for path in tests.rglob("*.py") for line in path.read_text().splitlines()]
    wrong = [
        f"{path.name}: {line}"
        for path, line in lines
        if re.match(r"\s*(from tests[\w.]*\.test_|from tests[\w.]* import test_)", line)
    ]
    assert not wrong


def test_an_installed_package_has_every_file() -> None:
    """Patterns are relative to the folder of a package that setuptools is told of."""
    options = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name: PACKAGE.parent / name.replace(".", "/") for name in options["packages"]}
    folders |= {name: PACKAGE.parent / path for name, path in options["package-dir"].items()}
    given = {
        path
        for name, patterns in options["package-data"].items()
        for p in patterns
        for path in folders[name].glob(p)
    }
    there = {path for folder in folders.values() for path in folder.iterdir() if path.is_file()}
    assert {path for path in there if path.suffix not in (".py", ".pyc")} == given
