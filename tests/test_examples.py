"""The scripts of examples/ run and print what they should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "one_step.py": ["inner  features.16:features.22", "loss ", "(16, 10)"],
    "own_model.py": ["stages.0: (16, 16, 16)", "True"],
    "deploy.py": ["sub1: 7.9 M MACs, accuracy 0.65", "sub1 (10,)"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples(name: str) -> None:
    if name == "deploy.py":
        pytest.importorskip("onnxruntime")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in PRINTED[name]), done.stdout
