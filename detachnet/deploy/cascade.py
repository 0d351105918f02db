"""family + held-out images -> a chain of models that goes on only where it is not confident.

A model goes on from where the one before parted from it: an image that goes on costs what the models it went
through do not share. Models that part at the image share nothing, so that their costs add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from detachnet.data.batches import Batches
from detachnet.data.datasets import Split
from detachnet.deploy.budget import check
from detachnet.deploy.family import Family, Picture, Resumable
from detachnet.errors import BudgetError, CutError, DataError
from detachnet.evaluation import check_fits, check_labels
from detachnet.fields import Fields
from detachnet.losses import logits
from detachnet.progress import counted
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.legs import shared_macs
from detachnet.surgery.modules import evaluating, in_type_of, on_device, weight_of
from detachnet.surgery.plan import BASE
from detachnet.text import Table, si

Item = TypeVar("Item")
STEPS = 50
"""Thresholds tried per chain: quantiles of the confidences of its models."""
MOST_CHAINS, MOST_MODELS = 1000, 40
"""Chains that are tried, the shorter ones first, and models that they are made of, evenly spaced by their cost."""
SHOWN = 12
"""Points of the curve that a table shows."""
BATCH = 250


@dataclass(frozen=True)
class Scores:
    """What some models said about some images.

    Attributes:
        confidence: Model → largest softmax of each image, `(N,)`.
        right: Model → whether the answer is right, `(N,)`, bool.
        macs: Model → multiply-accumulates for one image.
        shared: Two models → those that the second one need not spend where the first one ran.
        base_macs: The base-model's, which may be none of these; 0 for the dearest of them.
    """

    confidence: dict[str, Tensor]
    right: dict[str, Tensor]
    macs: dict[str, int]
    shared: Mapping[tuple[str, str], int] = field(default_factory=dict)
    base_macs: int = 0

    def added(self, models: Sequence[str], i: int) -> int:
        """What the model at a place of a chain costs more than those in front of it."""
        return self.macs[models[i]] - max((self.shared.get((m, models[i]), 0) for m in models[:i]), default=0)

    def of(self, images: slice) -> Scores:
        """Those of some images."""
        confidence = {name: values[images] for name, values in self.confidence.items()}
        right = {name: values[images] for name, values in self.right.items()}
        return Scores(confidence, right, self.macs, self.shared, self.base_macs)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(next(iter(self.right.values())))


class CascadePoint(Fields):
    """A chain of models at one threshold.

    Attributes:
        models: In the order they are run; one alone is a chain, too.
        threshold: An image goes on while the largest softmax is below it; the last model answers whatever comes.
        shares: Model → share of the images it answers.
        mean_macs: Multiply-accumulates per image on average, where each model goes on from the ones in front.
        mean_macs_apart: The same where each one starts from the image.
        accuracy: Share of right answers, in [0, 1].
        n: Number of images that the figures are of.
    """

    refused_as = {"": BudgetError}

    models: tuple[str, ...]
    threshold: float
    shares: dict[str, float]
    mean_macs: float
    mean_macs_apart: float
    accuracy: float
    n: int

    @property
    def chain(self) -> str:
        """`sub1 → base`."""
        return " → ".join(self.models)


class Curve(Fields):
    """The trade-off of a family's cascades; chosen on some images, with figures of others.

    Attributes:
        num_calibration: Number of images that chains and thresholds were chosen on.
        singles: Each model alone, the cheapest first.
        points: The cascades that no other cascade beat on the calibration images, the cheapest first.
        chosen: The one for the target, if one was given.
        base_macs: Multiply-accumulates of the base-model, which may be none of these; 0 for the dearest of them.
        tried: Which chains were tried, in words, where these are not all.
    """

    refused_as = {"": BudgetError}

    num_calibration: int
    singles: tuple[CascadePoint, ...]
    points: tuple[CascadePoint, ...]
    chosen: CascadePoint | None = None
    base_macs: int = 0
    tried: str = ""

    def better_single(self, point: CascadePoint) -> str | None:
        """The model that alone is at least as accurate as a cascade for no more MACs."""
        for single in reversed(self.singles):
            if single.accuracy >= point.accuracy and single.mean_macs <= point.mean_macs:
                return single.models[0]
        return None

    @property
    def table(self) -> Table:
        """Each model alone, then the curve, thinned out, and what was chosen."""
        rows = [self._row(single, "alone") for single in self.singles]
        rows += [self._row(point, self._verdict(point)) for point in thin(self.points, SHOWN)]
        rows += [self._row(self.chosen, "chosen")] if self.chosen else []
        apart = ("from the image",) if self.reuses else ()
        header = ("models", "", "threshold", "answers", "mean MACs", "of base", *apart, "accuracy")
        thinned = f"{SHOWN} of {len(self.points)} cascades, evenly spaced" if len(self.points) > SHOWN else ""
        notes = tuple(note for note in (thinned, self.tried) if note)
        return Table(header, tuple(rows), notes=notes, left=2)

    @property
    def reuses(self) -> bool:
        """Whether models go on from what others have computed."""
        return any(point.mean_macs != point.mean_macs_apart for point in self.points)

    @property
    def reading(self) -> str:
        """What an image that goes on costs, in a sentence."""
        if self.reuses:
            return "A model goes on from where the one in front parted; 'from the image': the cost without that."
        if any(point.shares[point.models[0]] < 1 for point in self.points):
            return "An image that goes on costs all models it went through: they part at the image."
        return "No image goes on: the first model of each cascade is confident of all of them."

    def verdicts(self) -> list[str]:
        """Where a cascade is worse than a single model, in sentences."""
        better = [name for point in self.points if (name := self.better_single(point)) is not None]
        names = ", ".join(sorted(set(better))) or "a single model"
        lines = [
            f"{len(better)} of {len(self.points)} cascades are worse than {names} alone: no cheaper, no better."
        ]
        name = self.better_single(self.chosen) if self.chosen else None
        if name is not None:
            alone = next(single for single in self.singles if single.models == (name,))
            figures = f"{100 * alone.accuracy:.2f} % for {si(round(alone.mean_macs))} MACs"
            lines.append(f"Use {name} alone instead of the cascade chosen: {figures}.")
        return lines

    def _verdict(self, point: CascadePoint) -> str:
        name = self.better_single(point)
        return f"worse than {name}" if name else ""

    def _row(self, point: CascadePoint, remark: str) -> tuple[str, ...]:
        alone = len(point.models) == 1
        base_macs = self.base_macs or self.singles[-1].mean_macs
        return (
            point.chain,
            remark,
            "" if alone else f"{point.threshold:.3f}",
            " / ".join(f"{100 * point.shares[name]:.0f} %" for name in point.models),
            si(round(point.mean_macs)),
            f"{100 * point.mean_macs / base_macs:.0f} %",
            *([f"{100 * point.mean_macs_apart / base_macs:.0f} %"] if self.reuses else []),
            f"{100 * point.accuracy:.2f} %",
        )


class CascadeAnswer(NamedTuple):
    """What a cascade said.

    Attributes:
        models: Which model answered each image.
        output: `(num_classes,)` for one image, `(B, num_classes)` for a batch.
        macs: Multiply-accumulates spent on all images.
    """

    models: tuple[str, ...]
    output: Tensor
    macs: int


class Cascade:
    """A chain of a family's models, ready to run.

    Args:
        family: The models.
        models: In the order they are run.
        threshold: An image goes on while the largest softmax is below it.

    Raises:
        CutError: No model has one of the names, or there is none.
        BudgetError: The threshold is no number.
    """

    def __init__(self, family: Family, models: Sequence[str], threshold: float) -> None:
        unknown = [name for name in models if name not in family.names]
        if unknown or not models:
            raise CutError(f"a cascade is made of {', '.join(family.names)}, not of {list(models)}")
        if not isinstance(threshold, int | float) or math.isnan(threshold):
            raise BudgetError(f"threshold is a share such as 0.9, not {threshold!r}")
        self.family, self.models, self.threshold = family, tuple(models), threshold

    def run(self, images: Picture) -> CascadeAnswer:
        """Run the first model on all images, the next ones on those of which the one before was not confident.

        Args:
            images: One image or a batch of them, as `Family.run` takes them.

        Raises:
            DataError: An image is broken, not finite or has another size.
        """
        work = self.family.resumable(images)
        return self._run_one(work) if work.is_single else self._run_batch(work)

    def _run_one(self, work: Resumable) -> CascadeAnswer:
        """Model after model, until one is confident."""
        for name in self.models:
            output = work.run(name).output
            if output.float().softmax(0).amax() >= self.threshold:
                break
        return CascadeAnswer((name,), output, work.macs)

    def _run_batch(self, work: Resumable) -> CascadeAnswer:
        """Model after model, on fewer and fewer images."""
        left = torch.arange(len(work))
        answered, outputs, macs = [""] * len(left), torch.empty(0), 0
        for name in self.models:
            output = work.run(name).output
            macs += work.macs
            done = (output.float().softmax(1).amax(1) >= self.threshold) | (name == self.models[-1])
            if name == self.models[0]:
                outputs = torch.empty_like(output)
            here = done.to(left.device)
            outputs[left[here].to(output.device)] = output[done]
            for index in left[here].tolist():
                answered[index] = name
            left, work = left[~here], work.select(~done)
            if not len(left):
                break
        return CascadeAnswer(tuple(answered), outputs, macs)


def calibrate(
    net: DetachableNet,
    split: Split,
    target_accuracy: float | None = None,
    target_macs: float | None = None,
    device: torch.device | str | None = None,
) -> Curve:
    """Choose chains and thresholds on every other image, and measure them on the rest.

    Every chain from a cheaper to a more expensive model is tried with `STEPS` thresholds. Of many models short
    ones alone are tried, `MOST_CHAINS` of `MOST_MODELS` models at most; `Curve.tried` says which.

    Args:
        net: A trained family with `data`.
        split: Images that it was not trained on.
        target_accuracy: Choose the cheapest cascade that reaches it on the calibration images, in [0, 1].
        target_macs: Or: the most accurate one with at most so many MACs per image on average.
        device: Where to run; by default where the family is.

    Raises:
        BudgetError: No cascade reaches the target; or both are given.
        CheckpointError: The family does not know how its images are normalized.
        DataError: This is no split, of other images than the family's, or of fewer than two; or a label is of no
            class that a model knows.
    """
    if target_accuracy is not None and target_macs is not None:
        raise BudgetError("a cascade has one target: an accuracy or mean MACs, not both")
    targets = {"accuracy": target_accuracy, "macs": target_macs}
    check({name: value for name, value in targets.items() if value is not None})
    if len(split) < 2:
        raise DataError(f"{len(split)} images cannot be divided into calibration and report")
    scores = score(net, split, device)
    calibration, report = scores.of(slice(0, None, 2)), scores.of(slice(1, None, 2))
    front = pareto(all_points(calibration))
    singles = [evaluate(calibration, (name,), 0.0) for name in order(scores.macs)]
    chosen = _choose(front, singles, target_accuracy, target_macs)
    return Curve(
        num_calibration=calibration.num_images,
        singles=tuple(evaluate(report, (name,), 0.0) for name in order(scores.macs)),
        points=tuple(evaluate(report, point.models, point.threshold) for point in front),
        chosen=evaluate(report, chosen.models, chosen.threshold) if chosen else None,
        base_macs=scores.base_macs,
        tried=_what_is_tried(order(scores.macs)),
    )


def score(net: DetachableNet, split: Split, device: torch.device | str | None = None) -> Scores:
    """Confidence and rightness of every trained model on every image."""
    check_fits(net, split)
    models, data = net.facts.models(net.names), net.facts.known_data
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    with on_device(net, device) as there, evaluating(net), torch.no_grad():
        batches = Batches(split, data, BATCH, there)
        for images, labels in counted(batches.epoch(), len(batches), "batches of images"):
            outputs = net(in_type_of(weight_of(net), images), which=models)
            for name in models:
                shares = logits(outputs[name]).float().softmax(1)
                check_labels(split.labels, shares.shape[1], name)
                best = shares.max(1)
                parts[name].append((best.values.cpu(), (best.indices == labels).cpu()))
    confidence = {name: torch.cat([c for c, _ in part]) for name, part in parts.items()}
    right = {name: torch.cat([r for _, r in part]) for name, part in parts.items()}
    macs = {name: net.plan[name].macs for name in models}
    return Scores(confidence, right, macs, shared_macs(net.legs), net.plan[BASE].macs)


def order(macs: Mapping[str, int]) -> list[str]:
    """The models, the cheapest first."""
    return sorted(macs, key=macs.__getitem__)


def evaluate(scores: Scores, models: Sequence[str], threshold: float) -> CascadePoint:
    """A chain's shares, mean MACs and accuracy; what the models of an image do not share adds up."""
    count = scores.num_images
    left = torch.ones(count, dtype=torch.bool)
    right, macs, apart, shares = 0, 0, 0, {}
    for i, name in enumerate(models):
        macs += int(left.sum()) * scores.added(models, i)
        apart += int(left.sum()) * scores.macs[name]
        done = left & (scores.confidence[name] >= threshold) if name != models[-1] else left
        right += int(scores.right[name][done].sum())
        shares[name] = int(done.sum()) / count
        left = left & ~done
    return CascadePoint(
        models=tuple(models),
        threshold=threshold,
        shares=shares,
        mean_macs=macs / count,
        mean_macs_apart=apart / count,
        accuracy=right / count,
        n=count,
    )


def all_points(scores: Scores) -> list[CascadePoint]:
    """Chains of two or more models with rising costs, at thresholds between their models' confidences."""
    return [
        evaluate(scores, chain, threshold)
        for chain in _chains(order(scores.macs))
        for threshold in _thresholds(scores, chain)
    ]


def _chains(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All chains of models, or as many as are tried, the shortest first; `names` in the order of their costs."""
    some, found = thin(names, MOST_MODELS), list[tuple[str, ...]]()
    for length in range(2, len(some) + 1):
        if len(found) + math.comb(len(some), length) > MOST_CHAINS:
            break
        found += combinations(some, length)
    return found


def _what_is_tried(names: Sequence[str]) -> str:
    """Which chains of models are tried, in words; empty if all are."""
    some, longest = min(len(names), MOST_MODELS), max(map(len, _chains(names)), default=0)
    if len(names) < 2 or longest == len(names):
        return ""
    which = f"the {some}" if some == len(names) else f"{some} of {len(names)}"
    return f"chains of at most {longest} of {which} models were tried"


def _thresholds(scores: Scores, chain: Sequence[str]) -> list[float]:
    """Quantiles of the confidences of all models of a chain that may pass an image on."""
    confidence = torch.cat([scores.confidence[name] for name in chain[:-1]]).double()
    steps = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    return sorted(set(torch.quantile(confidence, steps, interpolation="nearest").tolist()))


def pareto(points: Sequence[CascadePoint]) -> list[CascadePoint]:
    """Those that no other point beats in accuracy for no more MACs; the cheapest first."""
    front: list[CascadePoint] = []
    for point in sorted(points, key=lambda p: (p.mean_macs, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def thin(points: Sequence[Item], count: int) -> list[Item]:
    """At most `count` points or others, from first to last, spread evenly."""
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _choose(
    front: Sequence[CascadePoint], singles: Sequence[CascadePoint], accuracy: float | None, macs: float | None
) -> CascadePoint | None:
    """The cheapest point that is accurate enough, or the most accurate one that is cheap enough."""
    if accuracy is None and macs is None:
        return None
    if not front:
        raise BudgetError(f"a cascade is of two models at least; only {singles[0].models[0]} was trained")
    limit = -math.inf if accuracy is None else accuracy
    most = math.inf if macs is None else macs
    fitting = [point for point in front if point.accuracy >= limit and point.mean_macs <= most]
    if fitting:
        return fitting[0] if accuracy is not None else fitting[-1]
    alone = [p for p in singles if p.accuracy >= limit and p.mean_macs <= most]
    nearest = front[-1] if accuracy is not None else front[0]
    within = si(round(most)) if 1 <= most < math.inf else str(most)
    asked = f"{100 * limit:.2f} %" if accuracy is not None else f"{within} MACs per image"
    raise BudgetError(
        f"no cascade reaches {asked} on the {nearest.n} calibration images",
        what=f"the nearest has {100 * nearest.accuracy:.2f} % for {si(round(nearest.mean_macs))} MACs per image",
        hint=f"a single model does: {', '.join(p.models[0] for p in alone)}" if alone else "",
        nearest=(nearest.chain,),
    )
