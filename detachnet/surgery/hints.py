"""What is legal about a family but worth a second thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import TraceError
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.cuts import TOLD
from detachnet.surgery.graph import TracedGraph
from detachnet.surgery.modules import hooks_of
from detachnet.surgery.plan import BASE, Cuts, ModelPlan
from detachnet.surgery.tracer import PREFIX, Spec, leaves_of
from detachnet.surgery.whole import OWN_TENSOR

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet


def all_hints(analysis: CutAnalysis, models: Sequence[ModelPlan]) -> list[str]:
    """What is legal about a family but worth a second thought."""
    hints = []
    for before, model in pairwise(models):
        for span in model.spans:
            hints += _hints(analysis, model.name, span.end)
        if model.filters == "important":
            hints.append(
                f"{model.name} answers at chance until its norms are recalibrated or it is trained: "
                "no accuracy before that means anything"
            )
        entry = model.stepdown
        if entry is None or not model.is_cut:
            continue
        if entry.stem and model.macs >= before.macs:
            hints.append(f"{model.name} costs no less than {before.name}: its stem wants less width")
        elif caution := analysis.caution(analysis.find(model.spans[0].end), entry):
            hints.append(f"{model.name}: {caution}")
    return hints


def missed_shares(models: Sequence[ModelPlan], cuts: Cuts) -> list[str]:
    """Where shares of MACs were asked for, which sub-models have clearly more or less."""
    if isinstance(cuts, str | int | Mapping):
        return []
    shares = [cut for cut in cuts if isinstance(cut, float)]
    got = [(model.name, model.macs / max(1, models[0].macs)) for model in models[1:]]
    return [
        f"{name} keeps {100 * share:.0f} % of the MACs, not {100 * wanted:.0f} %: no better cut is nearer; "
        "sub_models= takes the same shares and leaves out blocks inside"
        for (name, share), wanted in zip(got, shares, strict=False)
        if abs(share - wanted) > TOLD
    ]


def _hints(analysis: CutAnalysis, name: str, cut: str) -> list[str]:
    """What is legal about the end of a span but worth a second thought."""
    hints = []
    if (calls := analysis.call_count(cut)) > 1:
        hints.append(f"{cut!r} is called {calls} times; the first call is meant, '{cut}_1' is the next")
    if analysis.splits_norm(analysis.find(cut)):
        hints.append(f"{name} is cut between {cut!r} and its batch norm")
    return hints


def left_out(net: DetachableNet) -> tuple[str, ...]:
    """What the model's own forward leaves for a later pass, or does without an effect on values."""
    lost = [
        reason for reason in net._derived.lost if (reason.counts or reason.is_soft) and reason.what != OWN_TENSOR
    ]
    places = [reason.where for reason in lost]
    lost += [reason for reason in net._derived.filled.values() if reason.of_images and reason.where not in places]
    return tuple(f"the family does without {reason}" for reason in lost)


def left_out_hooks(net: DetachableNet) -> tuple[str, ...]:
    """A hint where the model has hooks that no graph runs."""
    kept = [str(node.target) for node in net.traced(False).graph.nodes if node.op == "call_module"]
    hooked = [
        path
        for path, module in net.named_modules()
        if f"{path}.".startswith(PREFIX) and any(map(len, hooks_of(module)))
    ]
    lost = [path for path in hooked if not any(f"{path}.".startswith(f"{target}.") for target in kept)]
    names = ", ".join(repr(path.removeprefix(PREFIX)) if path != BASE else "the model itself" for path in lost)
    way_out = "; what they change belongs into its forward" if BASE in lost else ""
    return (f"the family does not run the hooks of {names}{way_out}",) if lost else ()


def norms_not_run(net: DetachableNet) -> tuple[str, ...]:
    """A hint where the model runs batch norms whose output nothing needs."""
    unused = ", ".join(repr(target.removeprefix(PREFIX)) for target in unused_norms(net.traced(True)))
    said = "the output of {} is not used: the family does not run it, and its statistics stay"
    return (said.format(unused),) if unused else ()


def unused_norms(traced: TracedGraph) -> list[str]:
    """Targets of batch norms that are called for no output; nothing reads their statistics."""
    live = {str(node.target) for node in traced.live}
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    return [
        target
        for target in dict.fromkeys(calls)
        if target not in live
        and isinstance(traced.module.get_submodule(target), _BatchNorm)
        and not any(name.startswith(f"{target}.") for name in live)
    ]


def hooks_of_parameters(model: nn.Module) -> tuple[str, ...]:
    """A hint where parameters have hooks, which no copy of a model has."""
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooked = [repr(name) for name, p in model.named_parameters() if any(getattr(p, kind, None) for kind in kinds)]
    said = f"the family has not the hooks of the parameters {', '.join(hooked)}: register them on net.base"
    return (said,) if hooked else ()


def of_a_single_image(net: DetachableNet) -> tuple[str, ...]:
    """A hint where a model gives a single image back without the axis of the batch."""
    graph = net.traced(False).graph
    squeezes = [
        n for n in graph.nodes if n.target in ("squeeze", torch.squeeze) and len(n.args) + len(n.kwargs) == 1
    ]
    if not squeezes:
        return ()
    try:
        values = net.traced(False).propagate(1).values
    except TraceError:
        return ()
    out = next(leaf for leaf in leaves_of(values[next(iter(reversed(graph.nodes)))]) if isinstance(leaf, Spec))
    if out.shape[:1] == (1,):
        return ()
    shape = f"({', '.join(map(str, out.shape))}{',' * (len(out.shape) == 1)})"
    return (
        f"of a single image the model gives {shape}, without the batch, as joint passes do not: squeeze an axis",
    )


def sums_to_one(outputs: list[Tensor]) -> bool:
    """Whether the main output is a probability for each class."""
    main = outputs[0] if outputs else None
    if main is None or main.ndim != 2 or main.shape[1] < 2 or not main.is_floating_point():
        return False
    return bool((main >= 0).all() and (main.sum(1) - 1).abs().max() < 1e-3)
