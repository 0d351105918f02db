import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each runs the script
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers.py"
MISSING = [name for name in ("earlyon", "torch_pruning") if find_spec(name) is None]


def run(*arguments: str, hidden: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The benchmark, with the modules in a folder in front of the installed ones."""
    environment = os.environ | ({"PYTHONPATH": str(hidden)} if hidden else {})
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def hide(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')\n")
    return folder


def test_without_any_peer_it_says_what_to_install(tmp_path: Path) -> None:
    ran = run("--quick", hidden=hide(tmp_path, "earlyon", "torch_pruning"))
    assert ran.returncode == 2, ran.stderr
    assert "pip install earlyon\n" in ran.stderr
    assert "pip install torch-pruning\n" in ran.stderr


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (see {SCRIPT.name})")
def test_quick(tmp_path: Path) -> None:
    ran = run("--quick", "--json", str(tmp_path / "peers.json"))
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "peers.json").read_text())
    costs = {row["approach"]: row for row in result["costs"]}
    macs = {(row["approach"], row["model"]): row["macs"] for row in result["rows"]}

    full = {macs["detachnet", "base"], macs["earlyon", "final"], macs["torch-pruning, 4", "full"]}
    assert len(full) == 1
    for pruned, sub in (("middle", "sub0"), ("small", "sub1")):
        assert 0.98 < macs["torch-pruning, 4", pruned] / macs["detachnet", sub] <= 1
    assert costs["torch-pruning, 4"]["files"] == 3
    assert costs["detachnet"]["files"] == costs["earlyon"]["files"] == 1
    assert all(0 < row["p50_s"] <= row["p90_s"] for row in result["rows"])


@pytest.mark.skipif(find_spec("torch_pruning") is None, reason="not installed: torch_pruning")
def test_goes_on_without_one_of_them(tmp_path: Path) -> None:
    ran = run("--quick", hidden=hide(tmp_path, "earlyon"))
    assert ran.returncode == 0, ran.stderr
    assert "earlyon is left out" in ran.stderr
    assert "torch-pruning, 16" in ran.stdout
