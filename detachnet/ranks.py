"""Which of several processes this is, as the environment says that torchrun and its like make."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this process writes files and speaks: the first of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def are_several() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
