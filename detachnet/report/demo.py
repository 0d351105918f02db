"""family -> a folder that a browser shows: the exported models, and a page that runs them side by side."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from detachnet.deploy.export import export
from detachnet.storage import new_folder
from detachnet.surgery.detachable import DetachableNet

RUNTIME = "^1.23.0"
"""Versions of onnxruntime-web that will do."""


def make_demo(net: DetachableNet, folder: str | Path) -> None:
    """Write a folder with the family as ONNX graphs and a page with a slider for the budget.

    The page needs onnxruntime-web beside it, which `npm install` in the folder fetches, and a server of files.

    Args:
        net: The family.
        folder: A new folder.

    Raises:
        ExportError: There is something at `folder` already, or a model cannot be exported.
    """
    page = resources.files("detachnet.report").joinpath("demo.html").read_bytes()
    package = {"private": True, "dependencies": {"onnxruntime-web": RUNTIME}}
    with new_folder(Path(folder)) as inside:
        export(net, inside / "family")
        (inside / "index.html").write_bytes(page)
        (inside / "package.json").write_text(json.dumps(package, indent=1) + "\n", encoding="utf-8")
