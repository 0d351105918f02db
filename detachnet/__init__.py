"""One CNN, many devices: a network and its detachable sub-models in one file.

    zoo -> trace -> cuts -> stepdown -> plan -> detachable -> train, save, detach

    >>> net = detachnet.make_detachable(model, cuts=["features.6", "features.23"], input_size=(3, 32, 32))
    >>> net.names
    ('base', 'sub0', 'sub1')
    >>> net(images, which="sub1").shape
    torch.Size([8, 10])

Importing this package imports nothing heavy; each name is loaded when it is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detachnet.checkpoint import load, save
    from detachnet.cuts import CutPoint, find_cuts
    from detachnet.deadline import DeadlineRunner
    from detachnet.detachable import DetachableNet, make_detachable
    from detachnet.errors import (
        BudgetError,
        CheckpointError,
        CutError,
        DataError,
        DetachNetError,
        MeasurementError,
        ModelError,
        RecipeError,
        StepDownError,
        TraceError,
    )
    from detachnet.losses import MultiModelLoss
    from detachnet.measure import Measurement, Profile, profile
    from detachnet.plan import DetachPlan
    from detachnet.recipe import Recipe, load_recipe
    from detachnet.runtime import Family
    from detachnet.trainer import train
    from detachnet.zoo import create_model

_HOMES = {
    "checkpoint": ("load", "save"),
    "cuts": ("CutPoint", "find_cuts"),
    "deadline": ("DeadlineRunner",),
    "detachable": ("DetachableNet", "make_detachable"),
    "errors": (
        "BudgetError",
        "CheckpointError",
        "CutError",
        "DataError",
        "DetachNetError",
        "MeasurementError",
        "ModelError",
        "RecipeError",
        "StepDownError",
        "TraceError",
    ),
    "losses": ("MultiModelLoss",),
    "measure": ("Measurement", "Profile", "profile"),
    "plan": ("DetachPlan",),
    "recipe": ("Recipe", "load_recipe"),
    "runtime": ("Family",),
    "trainer": ("train",),
    "zoo": ("create_model",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BudgetError",
    "CheckpointError",
    "CutError",
    "CutPoint",
    "DataError",
    "DeadlineRunner",
    "DetachNetError",
    "DetachPlan",
    "DetachableNet",
    "Family",
    "Measurement",
    "MeasurementError",
    "ModelError",
    "MultiModelLoss",
    "Profile",
    "Recipe",
    "RecipeError",
    "StepDownError",
    "TraceError",
    "create_model",
    "find_cuts",
    "load",
    "load_recipe",
    "make_detachable",
    "profile",
    "save",
    "train",
]

__version__ = version("detachnet")


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'detachnet' has no attribute {name!r}")
    return getattr(import_module(f"detachnet.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
