"""family -> the same family, traced again where its base-model is another one now."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detachnet.errors import StepDownError, WidthError
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.modules import Folder
from detachnet.surgery.planning import recounted
from detachnet.surgery.proof import UnlikeError, prove
from detachnet.text import by

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet

logger = logging.getLogger("detachnet")


def follow(net: DetachableNet) -> None:
    """Trace again where what the base-model's forward reads besides tensors has changed."""
    if torch.compiler.is_compiling():
        return
    for copied in net._copied:
        copied.follow()
    derived = net._derived
    derived.structure.tell_of_hooks()
    if derived.structure.is_hooked_anew():
        derived.views.forget_joint()
    if other := derived.structure.changed(net.base):
        logger.warning("%s is traced again: other parts of %s", net.plan.model, other)
    changed = derived.read.changed()
    for reading in changed:
        logger.warning("%s is traced again: %s", net.plan.model, reading)
    others = frozenset(path for path, module in derived.modal if module.training != net.training)
    if moved := others ^ net._tracing.others[net.training]:
        names = ", ".join(repr(path) if path else "the model itself" for path in sorted(moved))
        logger.warning("%s is traced again: another mode of %s", net.plan.model, names)
    if other or changed or moved or (net._follows_dtype and _has_another_dtype(net)):
        with torch.inference_mode(False), _wholly_or_not_at_all(net):
            now = {**net._tracing.others, net.training: others}
            net._tracing = replace(net._tracing, others=now)
            _trace_again(net, other, {reading.name for reading in changed})


@contextmanager
def _wholly_or_not_at_all(net: DetachableNet) -> Iterator[None]:
    """Leave a family as it was where it cannot follow: passes are refused until the change is undone."""
    held = dict(vars(net))
    folders = [net, net.norms, net.heads, *(module for module in net.modules() if isinstance(module, Folder))]
    tables: list[dict[str, Any]] = [net._buffers, net._kinds, *(module._modules for module in folders)]
    contents = [(table, dict(table)) for table in tables]
    not_saved = set(net._non_persistent_buffers_set)
    try:
        yield
    except BaseException:
        for table, content in [(vars(net), held), *contents]:
            table.clear()
            table.update(content)
        net._non_persistent_buffers_set = not_saved
        raise


def _trace_again(net: DetachableNet, changed: str, varied: Collection[str]) -> None:
    """Make the family anew, in place; with a module kept whole where that turns out to be needed."""
    try:
        _renew(net, changed, varied)
    except UnlikeError as error:
        if not error.owner or error.owner in net._tracing.leaves.paths:
            raise
        leaves = net._tracing.leaves.with_paths([error.owner])
        net._tracing = replace(net._tracing, leaves=leaves)
        _note_whole(net, {error.owner: error.said})
        _trace_again(net, changed, varied)
    except WidthError as error:
        raise _no_longer_narrow(error, changed) from None


def _renew(net: DetachableNet, changed: str, varied: Collection[str]) -> None:
    """Trace, and compare; the plan is of what is there now.

    Raises:
        DetachNetError: The model that there is now is refused.
    """
    traced = net.retraced()
    net._attach(traced)
    _note_whole(net, traced.whole)
    _check_spans(net, changed)
    net._put_own_layers(anew=True)
    if changed:
        graphs = {name: (both[False].traced, both[False].routes) for name, both in net._derived.sources.items()}
        net.plan = recounted(net.plan, graphs)
        net._count_own_params()
    _prove_again(net, changed, varied)


def _note_whole(net: DetachableNet, found: Mapping[str, str]) -> None:
    """Note in the plan, and tell, what is kept whole now."""
    new = {path: why for path, why in found.items() if path not in net.plan.whole}
    for path, why in new.items():
        logger.warning("%r is kept whole: %s", path, why)
    if new:
        net.plan = net.plan.model_copy(update={"whole": {**net.plan.whole, **new}})


def way_of(net: DetachableNet) -> int:
    """A number for what the base-model's graphs do, and what decided it; numbers not counted."""
    graphs = [net.traced(training).live for training in (False, True)]
    return hash((net._derived.read.choices, *((node.op, str(node.target)) for graph in graphs for node in graph)))


def _prove_again(net: DetachableNet, changed: str, varied: Collection[str]) -> None:
    """Compare the family with its model where that goes another way than any that was compared; tell of hints.

    So it is when some number varies for the first time: until then it may have been one that changes nothing.

    Raises:
        TraceError: They differ.
    """
    way = way_of(net)
    is_known = way in net._proven and net._varied.issuperset(varied)
    if net.check == "none" or (is_known and not changed):
        return
    for hint in prove(net, net.check).hints:
        if hint not in net.plan.hints:
            logger.warning("%s: %s", net.plan.model, hint)
    net._proven, net._varied = net._proven | {way}, net._varied.union(varied)


def _check_spans(net: DetachableNet, changed: str) -> None:
    """Refuse features that what stands for a span does not make any more.

    Raises:
        StepDownError: There is one.
    """
    for model in net.plan.models[1:]:
        analysis = CutAnalysis(net._derived.sources[model.name][False].traced)
        for span in model.spans:
            start, feature = (analysis.shape(analysis.find(end)) if end else () for end in (span.start, span.end))
            if feature != (made := span.bridge.feature if span.bridge else start):
                raise StepDownError(
                    f"{changed or net.plan.model} was changed: the feature at {span.end!r} is {by(feature)}, "
                    f"and what {model.name} has for it {by(made)}",
                    hint="make the family of the changed model: make_detachable(net.base, ...)",
                )


def _has_another_dtype(net: DetachableNet) -> bool:
    """Whether the weights have another dtype than the family was traced in; autocast is told, once."""
    held, name = net._derived.weight
    like: Tensor = held.get(name, net._tracing.example)
    is_told = net._told_of_autocast or not net._derived.asks_for_dtype
    if not is_told and torch.is_autocast_enabled(like.device.type):
        net._told_of_autocast = True
        logger.warning("%s decides by a dtype: inside autocast its family may not", net.plan.model)
    return like.dtype != net._derived.dtype and like.is_floating_point()


def _no_longer_narrow(error: WidthError, changed: str) -> WidthError:
    """Why a changed base-model has no place for sub-models with fewer filters."""
    place = "the base-model" if changed in ("", "the model itself") else repr(changed)
    return WidthError(
        f"{place} was changed: sub-models with fewer filters no longer fit",
        what=error.summary,
        hint="undo the change, or make the family of the changed model: make_detachable(net.base, ...)",
    )
