"""TracedModel -> SpanPoints: what a model can do without, and what must stand for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from detachnet.errors import StepDownError
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.graph import TracedModel
from detachnet.surgery.modules import unwrap
from detachnet.surgery.stepdown import StepDown, plan_bridge
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import Leaves
from detachnet.text import Shape


@dataclass(frozen=True)
class SpanPoint:
    """A part of a model that a sub-model can leave out; what lies between is left out by longer spans.

    Attributes:
        name: What `SubModel(drop=[…])` takes.
        shape: Shape of the feature at its end, without the batch.
        bridge: What stands for it; None where both ends have the same shape, so that nothing does.
        macs_saved: Multiply-accumulates for one image that leaving it out saves, the bridge's taken off.
        macs_of_base: `macs_saved` divided by the base-model's.
        params_saved: Number of parameters that leaving it out saves, the bridge's taken off.
    """

    name: str
    shape: Shape
    bridge: StepDown | None
    macs_saved: int
    macs_of_base: float
    params_saved: int


def span_points(traced: TracedModel) -> list[SpanPoint]:
    """The shortest spans with weights that begin and end behind an activation or a module, front to back."""
    analysis = CutAnalysis(traced.eval)
    return list(_points(analysis, span_places(analysis)))


def span_places(analysis: CutAnalysis) -> list[fx.Node]:
    """The cuts that spans begin behind and end at, front to back."""
    return [node for node in analysis.valid if _is_place(analysis, node)]


def _is_place(analysis: CutAnalysis, node: fx.Node) -> bool:
    """Whether a cut ends a block, or an activation or pooling that is in no block."""
    name, modules = analysis.traced.name_of.get(node, ""), dict(analysis.traced.root.base.named_modules())
    if name not in modules or analysis.splits_norm(node):
        return False
    if analysis.in_block(node):
        return False
    is_block = next(modules[name].children(), None) is not None
    return is_block or analysis.place(node) == "activation"


def _points(analysis: CutAnalysis, places: Sequence[fx.Node]) -> Iterator[SpanPoint]:
    """The span that ends at each place: from the nearest one in front of the same shape, else from the last."""
    total = max(1, sum(analysis.traced.macs.values()))
    for i, end in enumerate(places):
        front = places[:i]
        alike = (
            n for n in reversed(front) if analysis.shape(n) == analysis.shape(end) and _costs(analysis, n, end)[0]
        )
        start = next(alike, None) or next((n for n in reversed(front) if _costs(analysis, n, end)[0]), None)
        if start is None:
            continue
        try:
            bridge = plan_bridge(analysis.traced.image.shape[1:], analysis.shape(start), analysis.shape(end))
        except StepDownError:
            continue
        macs, num_params = _costs(analysis, start, end)
        macs -= bridge.macs if bridge else 0
        num_params -= bridge.num_params if bridge else 0
        if macs > 0 and num_params >= 0:
            name = ":".join(analysis.traced.name_of[node] for node in (start, end))
            yield SpanPoint(name, analysis.shape(end), bridge, macs, macs / total, num_params)


def _costs(analysis: CutAnalysis, start: fx.Node, end: fx.Node) -> tuple[int, int]:
    """MACs and parameters of what lies behind one cut, up to and including another."""
    return (
        analysis.tail_macs(start) - analysis.tail_macs(end),
        analysis.tail_params(start) - analysis.tail_params(end),
    )


def find_spans(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    example_input: Tensor | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
) -> list[SpanPoint]:
    """List what a model can do without, front to back: its blocks, and what changes the shape between them.

    Args:
        model: Any CNN; it is not run, moved or changed.
        input_size: Shape of one image, `(C, H, W)`; by default what the model declares.
        example_input: A batch `(B, ...)` instead.
        leaf_modules: Classes of modules to keep whole, or names of single modules.
        leaf_functions: Functions to keep whole.

    Returns:
        The shortest spans that save something. Two that follow each other are one: `a:b` and `b:c` are `a:c`.

    Raises:
        TraceError: The model cannot be traced at that size.

    Examples:
        >>> [span.name for span in detachnet.find_spans(torchvision.models.resnet18()) if span.bridge is None][-2:]
        ['layer3.0:layer3', 'layer4.0:layer4']
    """
    leaves = Leaves.given(leaf_modules, leaf_functions)
    return span_points(trace(unwrap(model), input_size, example_input, leaves))
