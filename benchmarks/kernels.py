"""How many kernels does a training step start? That is what it costs where launches dominate.

    python benchmarks/kernels.py [--quick] [--json FILE]

Forward and backward pass and losses of the families of `training_step.py` at 32×32 pixels; the update, one kernel
on CUDA, is left out. `operators` are torch's that compute something, not views: about what an accelerator is to
start without torch.compile. `compiled` are the kernels that torch.compile's inductor makes; here it makes them for
the CPU, where it fuses much as it does elsewhere (not with --quick: they take half a minute each). Counted, not
timed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from common import Row, arguments, begin, report
from training_step import QUICK, SMALL, WAYS, Case, Step

CPU = torch.device("cpu")
ONE_PASS = ("base", "joint")
_MAKES_NO_KERNEL = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
}


class Operators(TorchDispatchMode):
    """Counts what computes, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        view = getattr(function, "is_view", False) or name.startswith("_record_function")
        self.count += not view and name not in _MAKES_NO_KERNEL
        return function(*args, **(kwargs or {}))


def count_operators(step: Step, way: str) -> int:
    """Of the second step: the first one also writes the passes and makes the buffers."""
    step.run(way)
    with Operators() as operators:
        step.ways[way].add_gradients(step.images, step.target)
    return operators.count


def count_compiled(case: Case, way: str) -> int:
    """Kernels of the compiled forward and backward pass."""
    step = Step(case, CPU, compiled=True)
    metrics.reset()
    step.ways[way].add_gradients(step.images, step.target)
    return metrics.generated_kernel_count


def measure(case: Case, compiled: bool) -> Row:
    """The counts of one family, and the joint pass's over others'."""
    operators = {way: count_operators(Step(case, CPU), way) for way in WAYS if way != "freed"}
    kernels = {way: count_compiled(case, way) if compiled else None for way in ONE_PASS}
    return {
        "model": case.label,
        "norm": case.norm,
        **{f"{way}_operators": count for way, count in operators.items()},
        "joint_to_separate": operators["joint"] / operators["separate"],
        "joint_to_base": operators["joint"] / operators["base"],
        **{f"{way}_compiled": count for way, count in kernels.items()},
        "compiled_joint_to_base": kernels["joint"] / kernels["base"]
        if kernels["base"] and kernels["joint"]
        else None,
    }


def main() -> None:
    options = begin(arguments(__doc__, fixed=True))
    cases = QUICK if options.quick else [family(norm=norm) for family in SMALL for norm in ("private", "shared")]
    report(options, [measure(case, compiled=not options.quick) for case in cases])


if __name__ == "__main__":
    main()
