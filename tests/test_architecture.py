"""The rules of import, as docs/architecture.md says them."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "detachnet"
GROUND = {
    "errors",
    "text",
    "facts",
    "storage",
    "machine",
    "memory",
    "progress",
    "zoo",
    "models",
    "losses",
    "__init__",
}
MIDDLE = {"checkpoint", "fingerprint", "evaluation"}
MAY = {
    "ground": {"ground"},
    "data": {"ground", "data"},
    "surgery": {"ground", "surgery"},
    "middle": {"ground", "data", "surgery", "middle"},
    "training": {"ground", "data", "surgery", "middle", "training"},
    "deploy": {"ground", "data", "surgery", "middle", "deploy"},
    "selection": {"ground", "data", "surgery", "middle", "training", "deploy", "selection"},
    "report": {"ground", "data", "surgery", "middle", "training", "deploy", "selection", "report"},
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
            is_wing = (PACKAGE / name).is_dir()
            yield from (f"{name}.{alias.name}" for alias in node.names) if is_wing else [name]


def test_imports_go_down() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in imports(tree)
        if wing(other) not in MAY[wing(name)]
    ]
    assert not wrong


def test_every_file_is_in_a_wing_or_on_the_ground() -> None:
    assert {wing(name) for name in modules()} == set(MAY)


def test_no_circles() -> None:
    """Of imports at the top of files."""
    trees = modules()
    left = {
        name: {other for node in tree.body if isinstance(node, ast.ImportFrom) for other in imports(node)}
        for name, tree in trees.items()
    }
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_wings_list_their_files() -> None:
    for folder in (path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()):
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
