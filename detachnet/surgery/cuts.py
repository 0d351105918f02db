"""TracedModel -> CutPoints: the places to cut at, and those that come nearest to shares of the MACs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from detachnet.errors import CutError, StepDownError
from detachnet.surgery.analysis import CutAnalysis, Place
from detachnet.surgery.graph import TracedModel
from detachnet.surgery.modules import unwrap
from detachnet.surgery.stepdown import Stem, StepDown, plan_stepdown
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import Leaves, Spec
from detachnet.surgery.whole import is_soft

_NEAR = 0.15
"""How far from the wanted share of MACs a sub-model may be, and a better place be preferred."""
_PLACES = ("activation", "module", "inner")
TOLD = 0.05
"""How far from the wanted share of MACs a sub-model may be without a word."""


@dataclass(frozen=True)
class CutPoint:
    """A node every path from the image to the output passes through.

    Attributes:
        name: What to pass to `make_detachable`.
        shape: Shape of the feature there, `(C, h, w)`, without the batch.
        stepdown: The step-down a sub-model enters through.
        macs: Multiply-accumulates of that sub-model for one image, the step-down's included.
        num_params: Its number of parameters, the step-down's included.
        macs_of_base: `macs` divided by the base-model's.
        place: `activation`, the output of a module that ends in an activation or pooling, the best place to cut;
            `module`, that of another module; `inner`, in the middle of one, or in front of its batch norm.
        in_block: Whether it is in the middle of a block, as between the layers of an inverted residual.
        caution: Why a cut chosen for you is never this one; empty where it may be.
    """

    name: str
    shape: tuple[int, ...]
    stepdown: StepDown
    macs: int
    num_params: int
    macs_of_base: float
    place: Place
    in_block: bool = False
    caution: str = ""

    @property
    def rank(self) -> float:
        """How good a place it is, the less the better: ends of blocks before the middle of one."""
        return _PLACES.index(self.place) + 1.5 * self.in_block


def prepared_at(traced: TracedModel, analysis: CutAnalysis) -> str:
    """The cut behind which the image is prepared for the first layer, in both modes; empty if nothing is done."""
    end = analysis.preparation.end
    return end if end in traced.train.names else ""


def cut_points(traced: TracedModel, entry: str | Stem = "conv") -> list[CutPoint]:
    """Every valid cut of a traced model that a step-down exists for, front to back; `entry` is its kind."""
    analysis = CutAnalysis(traced.eval)
    prepared = prepared_at(traced, analysis)
    image = analysis.shape(analysis.find(prepared)) if prepared else traced.eval.image.shape[1:]
    points = []
    for node in analysis.valid:
        try:
            stepdown = plan_stepdown(image, analysis.shape(node), entry)
        except StepDownError:
            continue
        points.append(
            CutPoint(
                name=traced.eval.name_of[node],
                shape=analysis.shape(node),
                stepdown=stepdown,
                macs=stepdown.macs + analysis.tail_macs(node),
                num_params=stepdown.num_params + analysis.tail_params(node),
                macs_of_base=(stepdown.macs + analysis.tail_macs(node)) / max(1, sum(traced.eval.macs.values())),
                place=analysis.place(node),
                in_block=analysis.in_block(node),
                caution=analysis.caution(node, stepdown),
            )
        )
    return points


def every_node(traced: TracedModel) -> list[tuple[str, tuple[int, ...], str]]:
    """Each value that depends on the pixels: its name, its shape without the batch, and why it is no cut."""
    analysis = CutAnalysis(traced.eval)
    valid = set(analysis.valid)
    nodes = [n for n in traced.eval.live if n in traced.eval.data and n.op not in ("placeholder", "output")]
    return [
        (
            traced.eval.name_of.get(node, node.name),
            tuple(value.shape[1:]) if isinstance(value := traced.eval.values[node], Spec) else (),
            "" if node in valid else analysis.objection(node),
        )
        for node in nodes
    ]


def choose_cuts(traced: TracedModel, keep: Sequence[float], entry: str | Stem = "conv") -> list[str]:
    """The cuts whose sub-models come nearest to shares of the base-model's MACs, at the best places near them.

    A sub-model keeps a convolution, its step-down has no more parameters than what it replaces, and each costs
    less than the one before it, by at least half of what was asked for.

    Args:
        traced: The model.
        keep: Shares of the base-model's MACs, each in (0, 1), falling.
        entry: The step-down that will be built, which is what the costs are of.

    Raises:
        CutError: A share is out of range, or no cuts are near enough.
    """
    if any(not 0 < share < 1 for share in keep) or list(keep) != sorted(keep, reverse=True):
        raise CutError(
            f"cuts={list(keep)}: shares of the base-model's MACs lie between 0 and 1 and fall from front to back",
            hint="cuts=[0.7, 0.3]",
        )
    points = [point for point in cut_points(traced, entry) if point.stepdown.kind != "linear"]
    sound = [point for point in points if not point.caution]
    chosen = _nearest_chain(sound, keep)
    if chosen is None:
        raise _no_chain(traced.class_name, points, keep, entry)
    return [point.name for point in chosen]


def spread(count: int, most: float = 0.85, least: float = 0.15) -> list[float]:
    """Shares of MACs to keep for `count` sub-models, evenly between two of them."""
    return [most - (most - least) * (i + 1) / (count + 1) for i in range(count)]


def _nearest_chain(points: Sequence[CutPoint], keep: Sequence[float]) -> list[CutPoint] | None:
    """One point near each share, falling, whose distances and ranks add up to least; None if there are none."""
    best: dict[CutPoint | None, tuple[float, list[CutPoint]]] = {None: (0.0, [])}
    before = 1.0
    for share in keep:
        longer: dict[CutPoint | None, tuple[float, list[CutPoint]]] = {}
        for i, point in enumerate(points):
            if (distance := abs(point.macs_of_base - share)) > _NEAR:
                continue
            behind = [
                (cost, chain)
                for cost, chain in best.values()
                if (not chain or chain[-1] in points[:i])
                and (chain[-1].macs_of_base if chain else 1.0) - point.macs_of_base >= (before - share) / 2
                and (not chain or chain[-1].macs > point.macs)
            ]
            if behind:
                cost, chain = min(behind, key=lambda pair: pair[0])
                longer[point] = (cost + distance + point.rank, [*chain, point])
        best, before = longer, share
    return min(best.values(), key=lambda pair: pair[0])[1] if best else None


def _no_chain(model: str, points: Sequence[CutPoint], keep: Sequence[float], entry: str | Stem) -> CutError:
    """Why no cuts are near the shares that were asked for, and what to do."""
    shares = sorted({round(100 * point.macs_of_base) for point in points if not point.caution}, reverse=True)
    if shares:
        some = shares if len(shares) <= 8 else [*shares[:4], *shares[-4:]]
        what = f"sub-models that drop the front keep {', '.join(map(str, some))} % of the MACs"
        what += ", and each is to cost clearly less than the one before it" if len(keep) > 1 else ""
    elif points:
        least = min(points, key=lambda point: point.macs)
        what = f"no cut pays; {least.name!r}, the cheapest: {least.caution}"
    else:
        what = "there is none that a convolution could take in the image at"
    cheaper = "" if entry == "conv" else "; or stepdown='conv', or a Stem of less width, which costs less"
    count = len(keep)
    near = f"cuts near {', '.join(f'{100 * share:.0f} %' for share in keep)} of its MACs"
    return CutError(
        f"{model} has no {near if count <= 4 else f'{count} cuts spread over its MACs'}",
        what=what,
        hint=f"sub_models={min(count, 16)} leaves out blocks inside instead, where there are such{cheaper}",
    )


def find_cuts(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    example_input: Tensor | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
) -> list[CutPoint]:
    """List the places a model can be cut at, front to back.

    Args:
        model: Any CNN; it is not run, moved or changed.
        input_size: Shape of one image, `(C, H, W)`; by default what the model declares.
        example_input: A batch `(B, ...)` instead.
        leaf_modules: Classes of modules to keep whole, or names of single modules.
        leaf_functions: Functions to keep whole.

    Returns:
        The valid cuts: every path from the image to the output passes through each of them.

    Raises:
        TraceError: The model cannot be traced at that size.

    Examples:
        >>> [point.name for point in detachnet.find_cuts(torchvision.models.resnet18())][-4:]
        ['layer4.1.add', 'layer4', 'avgpool', 'flatten']
    """
    leaves = Leaves.given(leaf_modules, leaf_functions)
    traced = trace(unwrap(model), input_size, example_input, leaves)
    while soft := [path for path, why in traced.whole.items() if is_soft(why)]:  # opened where a cut is inside
        traced = trace(unwrap(model), input_size, example_input, leaves := leaves.opening(soft[0]))
    return cut_points(traced)
