"""family + more sub-models -> the family with them: what it had keeps its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from detachnet.errors import CutError
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.modules import copies_of_computed_tensors, copy_model
from detachnet.surgery.plan import BASE, DetachPlan
from detachnet.surgery.planning import make_plan
from detachnet.surgery.routes import SubModel, folder
from detachnet.surgery.widths.storing import Narrowing


def enlarged(
    net: DetachableNet,
    models: Mapping[str, SubModel],
    keep: Sequence[str] | None = None,
    narrowing: Narrowing | None = None,
) -> DetachableNet:
    """A family with more sub-models; the base-model and its earlier sub-models have the weights they had.

    The new ones start from the base-model's norms and head, whose statistics are not theirs: `measure_statistics`
    makes them so. Where they are one network with an earlier sub-model, they read what is that one's.

    Args:
        net: The family; it is not changed.
        models: Name → what the new sub-model leaves out.
        keep: Earlier sub-models to keep; all by default.
        narrowing: The base-model's trace and what is known of its filters, where they are at hand.

    Raises:
        CutError: A name is taken or none, two models are the same, or a new one needs a layer in place of a span,
            which would be untrained.
        WidthError: A width is of unknown filters or leaves none out, or the norms are shared.
    """
    kept = net.names[1:] if keep is None else [name for name in net.names[1:] if name in keep]
    if taken := sorted(set(models) & {BASE, *kept}):
        raise CutError(f"the family has a model {taken[0]!r} already", hint="choose another name")
    narrowing = narrowing or Narrowing(net.retraced(), net.base)
    plan, bridges = plan_enlarged(net, models, kept, narrowing)
    memo = copies_of_computed_tensors(net)
    bridges = {path: copy.deepcopy(net.get_submodule(path), memo) for path in bridges}
    made = DetachableNet(copy_model(net.base), plan, bridges, narrowing.traced, narrowing)
    new = {folder(name) for name in models}
    old = {
        n: value for n, value in net.state_dict().items() if n.startswith(f"{BASE}.") or n.split(".")[1] not in new
    }
    state = made.state_dict()
    made.load_state_dict({name: old.get(name, value) for name, value in state.items()})
    made.facts, made.active = net.facts, net.active if net.active in made.names else BASE
    made.check = net.check
    return made.train(net.training)


def check_enlargeable(net: DetachableNet) -> None:
    """Refuse a family that nothing can be added to.

    Raises:
        CutError: Its step-downs are made by a function of the user's, which the family does not keep.
    """
    if net.plan.entry == "custom":
        raise CutError(
            "a family with a step-down of your own cannot be enlarged",
            hint="make_detachable(net.base, {}) is a family of the base-model alone",
        )


def plan_enlarged(
    net: DetachableNet, models: Mapping[str, SubModel], kept: Sequence[str], narrowing: Narrowing
) -> tuple[DetachPlan, dict[str, nn.Module]]:
    """The plan of a family of some earlier and of new sub-models, and places of the former's bridges.

    Raises:
        CutError: See `enlarged`.
        WidthError: Likewise.
    """
    asked = {name: net.plan[name].asked for name in kept} | dict(models)
    check_enlargeable(net)
    with torch.random.fork_rng(devices=[]):
        plan, bridges = make_plan(narrowing.traced, asked, net.plan.norm, net.plan.entry, net.plan.head, narrowing)
    for name in models:
        for span in plan[name].spans:
            if span.bridge is not None:
                raise CutError(
                    f"{name} would need a new layer in place of '{span}', and that would be untrained",
                    hint="leave out spans whose ends have one shape: detachnet.find_spans(model) lists them",
                    node=span.end,
                )
    said = {"checked": net.plan.checked, "whole": net.plan.whole}
    return plan.model_copy(update=said), bridges
