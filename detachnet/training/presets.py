"""`preset = "paper"` -> the keys of a recipe that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "family": {"norm": "shared", "head": "shared", "stepdown": "conv"},
        "optimizer": {"name": "momentum", "lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"name": "multistep", "milestones": [50, 100, 150], "decay": 0.1, "warmup_epochs": 1},
        "train": {"epochs": 300, "batch_size": 32},
    }
}
"""Preset → table → its keys. `paper`: its section 3; it does not say the weight decay, which is our choice."""


def with_preset(tables: Any) -> Any:
    """The tables of a recipe, if that is what they are, with what its preset says where they say nothing.

    A table that names another optimizer or schedule has nothing of the preset's.
    """
    preset = tables.get("preset") if isinstance(tables, Mapping) else None
    if not isinstance(preset, str) or preset not in PRESETS:
        return tables
    found = dict(tables)
    for table, keys in PRESETS[preset].items():
        own = found.setdefault(table, {})
        if isinstance(own, Mapping) and own.get("name", keys.get("name")) == keys.get("name"):
            found[table] = {**keys, **own}
    return found
