"""costs of models + limits -> the model to run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from detachnet.errors import BudgetError

UNITS = {"latency_ms": "ms", "macs": "MACs", "memory_mb": "MB", "accuracy": ""}


class ModelCosts(NamedTuple):
    """What is known of a model that may be chosen.

    Attributes:
        model: Its name.
        accuracy: Test accuracy, in [0, 1].
        macs: Multiply-accumulates for one image.
        latency_ms: Measured milliseconds; None if no limit asks for them.
        memory_mb: Measured peak memory in 10^6 bytes; None if no limit asks for it.
    """

    model: str
    accuracy: float
    macs: float
    latency_ms: float | None = None
    memory_mb: float | None = None

    def excess(self, limit: str, value: float) -> float:
        """By which factor a limit is missed; at most 1 where it is kept."""
        figure = getattr(self, limit)
        if limit == "accuracy":
            return value / figure if figure else math.inf
        return float(figure / value)


def choose(candidates: Sequence[ModelCosts], limits: Mapping[str, float]) -> str:
    """The most accurate model within some limits; given only an accuracy, the fastest model that reaches it.

    Args:
        candidates: The models, with latency and memory where a limit names them or only an accuracy is given.
        limits: `latency_ms`, `macs` and `memory_mb` at most; `accuracy` at least.

    Returns:
        The model's name; of equally good ones the one with fewer MACs.

    Raises:
        BudgetError: A limit makes no sense, or no model keeps all of them.
    """
    check(limits)
    worst = {c: max((c.excess(*limit) for limit in limits.items()), default=0.0) for c in candidates}
    fitting = [candidate for candidate in candidates if worst[candidate] <= 1]
    if not fitting:
        raise _impossible(min(candidates, key=worst.__getitem__), limits)
    if set(limits) == {"accuracy"}:
        return min(fitting, key=lambda c: (c.latency_ms, c.macs)).model
    return max(fitting, key=lambda c: (c.accuracy, -c.macs)).model


def check(limits: Mapping[str, Any]) -> None:
    """Refuse a limit that makes no sense."""
    for name, value in limits.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise BudgetError(f"{name}={value!r}: a budget is a positive number")
    accuracy = limits.get("accuracy", 0)
    if accuracy > 1:
        raise BudgetError(
            f"accuracy={accuracy:g} is not a share in [0, 1]", hint=f"for {accuracy:g} %: {accuracy / 100:g}"
        )


def _impossible(nearest: ModelCosts, limits: Mapping[str, float]) -> BudgetError:
    """No model keeps the limits; the one that misses them least, with its figures."""
    asked = ", ".join(f"{name}={value:g}" for name, value in limits.items())
    missed = [name for name, value in limits.items() if nearest.excess(name, value) > 1]
    figures = ", ".join(f"{name}={getattr(nearest, name):.4g}" for name in missed)
    return BudgetError(
        f"no model keeps {asked}: {nearest.model} comes nearest with {figures}",
        what=", ".join(f"{nearest.model}: {_text(name, getattr(nearest, name))}" for name in limits),
        hint="a budget that a model keeps",
        nearest=(nearest.model,),
    )


def _text(limit: str, figure: float) -> str:
    if limit == "accuracy":
        return f"accuracy {100 * figure:.2f} %"
    return f"{figure:,.4g} {UNITS[limit]}"
