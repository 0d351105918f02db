"""A trained family, held-out images and budgets -> the front: what `detachnet.search` does."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from detachnet.data.batches import mix
from detachnet.data.datasets import Split
from detachnet.deploy.measurement import Runtime
from detachnet.deploy.stopwatch import Stopwatch
from detachnet.errors import BudgetError, CheckpointError, DataError, MeasurementError
from detachnet.evaluation import check_fits, check_labels
from detachnet.progress import tell
from detachnet.selection.candidate import Candidate
from detachnet.selection.costs import checked, counted
from detachnet.selection.drawn import drawn
from detachnet.selection.even import evenly
from detachnet.selection.evolution import evolve as evolved
from detachnet.selection.front import UNITS, By, Found, Front, FrontPoint, name_of, unbeaten
from detachnet.selection.greedy import best_within, greedy, put_back
from detachnet.selection.journal import Journal, Trials
from detachnet.selection.latency import Latency
from detachnet.selection.space import Cost, Space
from detachnet.selection.worth import Judge, Worth, at_chance, judged
from detachnet.storage import locked
from detachnet.surgery.detachable import DetachableNet, family_in
from detachnet.surgery.enlarging import enlarged
from detachnet.surgery.plan import BASE
from detachnet.surgery.routes import SubModel

JOURNAL = "search.jsonl"
"""Every candidate that was tried, in a run's folder."""
DRAWN = 10
"""Candidates that are drawn at random for each budget."""


def search(
    net: DetachableNet,
    data: Split,
    budgets: Sequence[float],
    *,
    by: By = "macs",
    runtime: Runtime | None = None,
    threads: int | None = None,
    calibration: Split | None = None,
    evolve: int = 0,
    seed: int = 0,
    folder: str | Path | None = None,
    executor: Executor | None = None,
) -> Front:
    """Find the sub-models of a trained network that are the most accurate within budgets.

    A candidate leaves out spans and eighths of groups of filters, of those the least important. It costs what is
    counted of it; it is worth its accuracy on held-out images inside the family, its norms measured anew. The
    search is greedy: it begins with the base-model and leaves out, step by step, what loses least accuracy for
    what it saves, until the smallest budget is met. For each budget, all groups narrowed alike are tried, too, and
    what fits into it again is put back. The best of all that was tried within each budget is chosen.

    Args:
        net: The family, trained, with `facts.data`; it is not changed.
        data: Images that it was not trained on, and that are no test images: they decide.
        budgets: What sub-models may cost: MACs for one image, or bytes of parameters, shares of the base-model's
            below 1; or milliseconds for one image.
        by: What budgets are of: `macs`, `bytes`, or `latency_ms`: the latency on this machine. For that the
            segments of the network are measured, for each number of filters once, and added up; what is chosen is
            measured as a whole, and keeps its budget so.
        runtime: What latencies are measured through: `torch` or `onnx`; by default `torch`.
        threads: Threads of the CPU for that; by default torch's present number.
        calibration: Training images that norms are measured on; by default those of `data`, without their classes.
        evolve: So many more candidates are tried that evolve from the best.
        seed: Of what is drawn at random.
        folder: What was tried is kept in a file there, which the same search goes on from.
        executor: Tries several candidates at a time: any of `concurrent.futures`. Results do not depend on it.

    Returns:
        The sub-models that were chosen, and the family with them.

    Raises:
        BudgetError: A budget makes no sense, or nothing that can be left out meets it; with what comes nearest.
        ExportError: ONNX Runtime is not installed.
        DataError: This is no split, of other images than the family's, or of none; or a label is of no class that
            the family knows.
        MeasurementError: The base-model, or all that is left when anything is left out, answers at chance; or a
            part of the network cannot be measured.
        CutError: Nothing can be left out.
        TraceError: This is no family.
        CheckpointError: The family does not know its data, or the folder has the file of another search.

    Examples:
        >>> front = detachnet.search(net, held_out, [0.6, 0.3])
        >>> front.net.names
        ('base', 'macs60', 'macs30')
    """
    net = family_in(net)
    if isinstance(budgets, Real):
        raise BudgetError(f"budgets={budgets!r}: give a list of budgets", hint=f"search(net, data, [{budgets!r}])")
    stopwatch = _stopwatch(by, runtime, threads, net)
    calibration = data if calibration is None else calibration
    for images in (data, calibration):
        check_fits(net, images)
    if not len(data):
        raise DataError("there are no held-out images to search with", hint="keep some from the training images")
    check_labels(data.labels, len(net.facts.known_data.classes), BASE)
    space = Space(net)
    with _kept(folder) as path:
        journal = Journal(path, _about(net, data, calibration))
        cost = Latency(space, journal, stopwatch) if stopwatch else counted(space, by)  # type: ignore[arg-type]
        limits = _reachable(space, cost, checked(budgets, by, cost(Candidate()) or 0.0), by)
        trials = Trials(Judge(net, data, calibration, space), journal, executor)
        _try_all(space, cost, trials, limits, len(data), evolve, seed)
        front = _front(space, cost, trials, limits, by, data, calibration)
        if stopwatch:
            stopwatch.other_work.tell()
        return front


def _stopwatch(by: By, runtime: Runtime | None, threads: int | None, net: DetachableNet) -> Stopwatch | None:
    """What measures latencies, where budgets are such.

    Raises:
        BudgetError: Budgets are of something unknown, or of what is counted and not measured.
        MeasurementError: There is no such runtime, or no such number of threads.
    """
    if by not in get_args(By):
        raise BudgetError(f"by={by!r}: budgets are of {', '.join(get_args(By))}")
    if by == "latency_ms":
        return Stopwatch(runtime or "torch", threads, next(net.parameters()).device)
    if runtime is not None or threads is not None:
        raise BudgetError(f"runtime and threads are for budgets of latency_ms; {by} are counted")
    return None


@contextmanager
def _kept(folder: str | Path | None) -> Iterator[Path | None]:
    """The file that candidates are kept in, for this process alone."""
    if folder is None:
        yield None
        return
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {place}", what=str(error)) from error
    with locked(place):
        yield place / JOURNAL


def _reachable(space: Space, cost: Cost, limits: list[float], by: By) -> list[float]:
    """Budgets that something can meet.

    Raises:
        BudgetError: One of them nothing can.
    """
    smallest = space.smallest(cost)
    least = cost.whole(smallest) if isinstance(cost, Latency) else cost(smallest) or math.inf
    base = cost(Candidate()) or math.inf
    if least <= limits[-1]:
        return limits
    raise BudgetError(
        f"no sub-model of {space.net.plan.model} costs {limits[-1]:,.4g} {UNITS[by]} or less: "
        f"the least is {least:,.4g}, {100 * least / base:.3g} % of the base-model's",
        what="with an eighth of all filters, and without every span that nothing needs to stand for",
        hint=f"a budget from {least:.4g} {UNITS[by]} on"
        if isinstance(cost, Latency)
        else f"a budget from {math.ceil(1000 * least / base) / 1000:g} of the base-model's on",
        nearest=(f"{least:.4g}",),
    )


def _about(net: DetachableNet, data: Split, calibration: Split) -> dict[str, Any]:
    """What the worth of a candidate depends on."""
    return {
        "format_version": 1,
        "model": net.plan.model,
        "weights": _digest(net.state_dict().values()),
        "head": net.plan.head,
        "normalization": [list(net.facts.known_data.mean), list(net.facts.known_data.std)],
        "images": len(data),
        "held_out": _digest([data.images, data.labels]),
        "calibration": _digest([calibration.images]),
    }


def _digest(values: Any) -> str:
    """Of the bytes of tensors."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _try_all(
    space: Space, cost: Cost, trials: Trials, limits: Sequence[float], images: int, tries: int, seed: int
) -> None:
    """Try candidates until the budgets are met, and so many more.

    Raises:
        MeasurementError: The base-model or all others answer at chance.
    """
    (base,) = trials([Candidate()])
    classes = len(space.net.facts.known_data.classes)
    if at_chance(base, classes, images):
        raise MeasurementError(
            f"the base-model answers at chance on the held-out images: {100 * base.accuracy:.1f} %",
            hint="train it first: a search compares what a trained network loses",
        )
    whole, least = cost(Candidate()) or 0.0, limits[-1]
    for step, here in enumerate(_down_to(least, space, cost, trials)):
        gone = (whole - (cost(here) or 0.0)) / max(whole - least, 1e-12)
        tell("% of the way to the smallest budget", min(100, round(100 * gone)), 100)
        if step == 1:
            _check_not_all_at_chance(trials, classes, images)
    trials([even for budget in limits if (even := evenly(space, cost, budget))])
    for number, budget in enumerate(limits):
        trials(list(drawn(space, cost, budget, DRAWN, mix(seed, f"drawn {number}"))))
    for budget in limits:
        for _ in put_back(space, cost, trials, budget):
            pass
    if tries:
        for _ in evolved(space, cost, trials, limits, tries, seed):
            pass


def _down_to(budget: float, space: Space, cost: Cost, trials: Trials) -> Iterator[Candidate]:
    """The way of greedy to a budget; to a latency until the whole keeps it, which segments only add up to."""
    aim, here = budget, Candidate()
    while True:
        for here in greedy(space, cost, trials, aim):
            yield here
        costs = cost(here) or 0.0
        if not isinstance(cost, Latency) or costs > aim or (whole := cost.whole(here)) <= budget:
            return
        aim = costs * budget / whole


def _check_not_all_at_chance(trials: Trials, classes: int, images: int) -> None:
    """Refuse to choose where whatever is left out leaves nothing.

    Raises:
        MeasurementError: All candidates answer at chance.
    """
    others = [worth for candidate, worth in trials.seen.items() if not candidate.is_base]
    if all(at_chance(worth, classes, images) for worth in others):
        best = max(worth.accuracy for worth in others)
        raise MeasurementError(
            f"all {len(others)} candidates answer at chance, the best with {100 * best:.1f} %: "
            "there is nothing to choose by",
            hint="train it longer, or with narrower and shorter sub-models in it: recipe vgg16_quarter_supernet",
        )


def _front(
    space: Space,
    cost: Cost,
    trials: Trials,
    limits: Sequence[float],
    by: By,
    data: Split,
    calibration: Split,
) -> Front:
    """What is chosen of all that was tried.

    Raises:
        BudgetError: Nothing within a budget was found, with what comes nearest.
    """
    tried = list(trials.seen.items())
    base = cost(Candidate()) or 0.0
    chosen = _chosen(tried, cost, limits, by)
    subs = {candidate: space.sub_model(candidate) for candidate in chosen}
    names = {candidate: _already(space, candidate) for candidate in chosen}
    new: dict[str, SubModel] = {}
    for candidate, kept in chosen.items():
        if not names[candidate]:
            names[candidate] = _free(name_of(by, kept[-1], base), {*space.net.names, *new})
            new[names[candidate]] = subs[candidate]
    net = enlarged(space.net, new, narrowing=space.narrowing).eval()
    found = []
    for candidate, name in names.items():
        worth = judged(net, name, data, calibration if name in new else None)
        point = _point(space, cost, candidate, worth)
        whole = cost.whole(candidate) if isinstance(cost, Latency) else None
        found.append(Found(**vars(point), name=name, budgets=tuple(chosen[candidate]), measured=whole))
    if net.facts.trained:
        net.facts = net.facts.updated(trained=(*net.facts.trained, *new))
    points = {candidate: _point(space, cost, candidate, worth) for candidate, worth in tried}
    return Front(
        net=net,
        by=by,
        base=points[Candidate()],
        found=tuple(found),
        points=unbeaten(points.values()),
        tries=len(tried),
        images=len(data),
        seconds=sum(worth.seconds for _, worth in tried),
        how=cost.how if isinstance(cost, Latency) else "",
    )


def _chosen(
    tried: Sequence[tuple[Candidate, Worth]], cost: Cost, limits: Sequence[float], by: By
) -> dict[Candidate, list[float]]:
    """The best candidates within budgets → which; latencies are kept by what is measured whole.

    Raises:
        BudgetError: Nothing within a budget was found, with what comes nearest.
    """

    def price(candidate: Candidate) -> float | None:
        whole = cost.measured.get(candidate) if isinstance(cost, Latency) else None
        return cost(candidate) if whole is None else whole

    chosen: dict[Candidate, list[float]] = {}
    for budget in limits:
        best = best_within(tried, price, budget)
        while best is not None and isinstance(cost, Latency) and cost.whole(best) > budget:
            best = best_within(tried, price, budget)
        if best is None:
            nearest = f"{min(costs for c, _ in tried if (costs := price(c)) is not None):,.4g}"
            raise BudgetError(
                f"no candidate within {budget:,.4g} {UNITS[by]} was found: the least has {nearest}",
                hint="a larger budget",
                nearest=(nearest,),
            )
        chosen.setdefault(best, []).append(budget)
    return chosen


def _point(space: Space, cost: Cost, candidate: Candidate, worth: Worth) -> FrontPoint:
    """A candidate as it is reported."""
    plan, costs = space.plan(candidate), cost(candidate)
    assert plan is not None
    assert costs is not None
    sub = None if candidate.is_base else candidate.asked
    return FrontPoint(sub, costs, plan.macs, plan.num_params, worth.accuracy)


def _already(space: Space, candidate: Candidate) -> str:
    """The sub-model of the family that leaves out the same, in whatever words; empty if there is none."""
    plan, kept = space.plan(candidate), space.sub_model(candidate).kept
    assert plan is not None
    route, models = space.net.route_of(plan), space.net.plan.models[1:]
    return next((m.name for m in models if (space.net.route_of(m), m.kept) == (route, kept)), "")


def _free(name: str, taken: set[str]) -> str:
    """A name that no model of the family has."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
