"""Where a family's file is."""

from __future__ import annotations

from pathlib import Path


def family_file(path: Path) -> Path:
    """A checkpoint as it is given: a file, or the folder of a run, which stands for its last one."""
    return path / "last.safetensors" if path.is_dir() else path
