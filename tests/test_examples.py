"""The scripts and the notebook of examples/ run and show what they should."""

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "one_step.py": ["inner  features.16:features.22", "loss ", "(16, 10)"],
    "own_model.py": ["stages.0: (16, 16, 16)", "True"],
    "deploy.py": ["sub1: 7.9 M MACs, accuracy 0.65", "sub1 (10,)"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "deploy.py":
        pytest.importorskip("onnxruntime")
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(text in printed for text in PRINTED[name]), printed


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cell after cell, as a notebook runs them; what a cell ends with is shown."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    for cell in json.loads((EXAMPLES / "choose.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        tree = ast.parse("".join(cell["source"]))
        last = (
            tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and "print" not in cell["source"][-1] else None
        )
        exec(compile(tree, "choose.ipynb", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "choose.ipynb", "eval"), names))
    (net,) = shown
    assert net._repr_html_().count('<svg class="bar"') == 3
    printed = capsys.readouterr().out
    for text in ("layer1.0:layer1", "loss ", "accuracy", "sub1 (64, 10)"):
        assert text in printed
