"""TracedModel + shares of its costs to keep -> SubModels: the routes that lose least, by a dynamic program.

The places of a model (ends of blocks, activations and poolings outside of blocks) are a chain from the image to
the output. A route runs or leaves out what lies between them; each way through the chain has a cost, which adds
up, and a loss, which adds up over the spans that it leaves out. The program keeps at each place the ways that no
other way beats in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from detachnet.errors import CutError, StepDownError, nearest
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.cuts import prepared_at, spread
from detachnet.surgery.graph import TracedModel
from detachnet.surgery.routes import MOST_CHOSEN, SubModel
from detachnet.surgery.spans import span_places
from detachnet.surgery.stepdown import Stem, plan_bridge, plan_stepdown

_LATE = 2.0
"""Loss of parting from the base-model at the image, relative to that of leaving out a whole stage."""
_BRIDGED = 1.0
"""Loss of a layer in place of a span, relative to the same; the first block of a stage goes only with it."""
_TIE = 1e-6
"""The same where only a tie is decided: of a stage's blocks that cost the same the last are left out."""
_STEPS = 1000
"""Ways whose costs differ by less than this fraction of the base-model's are compared by their loss alone."""


@dataclass(frozen=True)
class _Way:
    """A way from the image to a place."""

    loss: float = 0.0
    cost: float = 0.0
    spans: tuple[tuple[int, int], ...] = ()
    """Positions in the chain that it leaves out between."""


class _Chain:
    """The places of a model, and what it costs and loses to go from one to another."""

    def __init__(
        self,
        traced: TracedModel,
        stepdown: str | Stem,
        costs: Mapping[str, float] | None,
        importance: Mapping[str, float] | None,
    ) -> None:
        self.model = traced.class_name
        self.analysis = analysis = CutAnalysis(traced.eval)
        first = prepared_at(traced, analysis)
        image = next(node for node in traced.eval.live if node.op == "placeholder")
        begin = analysis.find(first) if first else image
        behind = [node for node in span_places(analysis) if analysis.position[node] > analysis.position[begin]]
        self.places = [begin, *behind]
        self.names = [first, *(analysis.traced.name_of[node] for node in behind)]
        self.shapes = list(map(analysis.shape, self.places))
        self.stepdown = stepdown
        self.macs = self._steps_in_macs()
        steps = self.macs if costs is None else self._steps_in(costs)
        self.total = sum(steps)
        self.upto = list(accumulate(steps))[:-1]
        self.per_mac = self.total / max(1, sum(self.macs))
        self.stages = self._stages()
        self.importance = importance
        self.lost = None if importance is None else self._known_losses(importance)

    def _steps_in_macs(self) -> list[float]:
        """MACs up to each place from the one in front, and of what is behind the last."""
        whole = float(sum(self.analysis.traced.macs.values()))
        behind = [whole, *(float(self.analysis.tail_macs(node)) for node in self.places[1:]), 0.0]
        return [0.0, *(a - b for a, b in pairwise(behind))]

    def _steps_in(self, costs: Mapping[str, float]) -> list[float]:
        """The same in a user's unit."""
        wanted = [*self.names[1:], ""]
        if missing := [name for name in wanted if name not in costs]:
            raise CutError(
                f"costs has no {missing[0]!r}",
                hint="detachnet.measure_segments(model) gives the seconds of each; '' is what follows the last",
            )
        if any(not 0 <= costs[name] < float("inf") for name in wanted):
            raise CutError("costs are numbers from 0 on")
        return [0.0, *(float(costs[name]) for name in wanted)]

    def _stages(self) -> list[tuple[int, int]]:
        """First and last place of each run of places whose features have one shape."""
        found: list[tuple[int, int]] = []
        for i in range(1, len(self.places)):
            same = found and self.shapes[i] == self.shapes[i - 1]
            found = [*found[:-1], (found[-1][0], i)] if same else [*found, (i, i)]
        return found

    def _known_losses(self, importance: Mapping[str, float]) -> list[float]:
        """Step -> measured loss of leaving it out; the largest of all where none was measured."""
        index = {"": 0} | {name: i for i, name in enumerate(self.names)}
        worst = max([0.0, *importance.values()])
        lost = [worst] * len(self.places)
        for span, loss in importance.items():
            ends = [index.get(name) for name in span.split(":")]
            if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] >= ends[1]:
                raise CutError(
                    f"importance has {span!r}, which is no span of this model",
                    hint="detachnet.span_importance(model, images, target) gives that of each",
                    nearest=nearest(span, [f"{a}:{b}" for a, b in pairwise(self.names)]),
                )
            # What lies between may have no weights: the whole loss is that of the last step that has.
            steps = [i for i in range(ends[0] + 1, ends[1] + 1) if self.macs[i]]
            for i in steps:
                lost[i] = max(0.0, loss) / len(steps)
        return lost

    def step(self, i: int) -> float:
        """Cost from the place in front to a place; that of what is behind the last for one more."""
        return self.total - self.upto[-1] if i == len(self.places) else self.upto[i] - self.upto[i - 1]

    def drop(self, way: _Way) -> list[str]:
        """The spans that a way leaves out."""
        return [f"{self.names[i]}:{self.names[j]}" for i, j in way.spans]

    def bridge(self, i: int, j: int) -> float | None:
        """Cost of what stands for a span; None where there is nothing that could."""
        image, before, after = self.shapes[0], self.shapes[i], self.shapes[j]
        try:
            planned = plan_bridge(image, before, after) if i else plan_stepdown(image, after, self.stepdown)
        except StepDownError:
            return None
        return planned.macs * self.per_mac if planned else 0.0

    def loss(self, i: int, j: int) -> float:
        """What is lost by leaving out a span: more the more of a stage it is."""
        bridged = i == 0 or self.shapes[i] != self.shapes[j]
        if self.lost is not None:
            return sum(self.lost[k] for k in range(i + 1, j + 1) if self.macs[k]) + bridged * max(self.lost)
        loss = _BRIDGED if bridged else 0.0
        for first, last in self.stages:
            whole = [k for k in range(first, last + 1) if self.macs[k]]
            loss += (sum(i < k <= j for k in whole) / len(whole)) ** 2 if whole else 0.0
        return loss

    def parting(self, i: int) -> float:
        """What is lost by parting from the base-model at a place."""
        share = 1 - self.upto[i] / max(self.total, 1e-300)
        return (_LATE if self.lost is None else _TIE) * share

    def has_left(self, way: _Way, i: int) -> bool:
        """Whether a way has left out some of a place's stage, and the rule is for one span of each."""
        if self.lost is not None:
            return False
        first = max((first for first, _ in self.stages if first <= i), default=0)
        return bool(way.spans) and way.spans[-1][1] >= first

    def spans_from(self, i: int) -> Iterator[int]:
        """Where spans that begin behind a place may end: in its stage, and at the ends of later ones."""
        for first, last in self.stages:
            if first <= i < last:
                yield from range(i + 1, last + 1)
            elif first > i and (i == 0 or any(i == end for _, end in self.stages)):
                yield from dict.fromkeys((first, last))


def choose_models(
    traced: TracedModel,
    sub_models: int | str | Sequence[float],
    stepdown: str | Stem = "conv",
    costs: Mapping[str, float] | None = None,
    importance: Mapping[str, float] | None = None,
) -> dict[str, SubModel]:
    """The sub-models `sub0`, `sub1`, … that `make_detachable(model, sub_models=…)` asks for.

    Raises:
        CutError: It is neither a number of sub-models, nor `"auto"`, nor shares of costs, or see `choose_routes`.
    """
    if sub_models == "auto":
        sub_models = 2
    if isinstance(sub_models, int) and sub_models is not True:
        if not 1 <= sub_models <= MOST_CHOSEN:
            raise CutError(f"sub_models={sub_models}: a family has 1 to {MOST_CHOSEN} sub-models")
        chain = _Chain(traced, stepdown, costs, importance)
        return _named(_spread_routes(chain, _ways(chain), sub_models))
    if (
        isinstance(sub_models, bool | str)
        or not isinstance(sub_models, Sequence)
        or not sub_models
        or not all(isinstance(share, float) for share in sub_models)
    ):
        raise CutError(
            f"sub_models={sub_models!r}: give a number of sub-models, 'auto', or shares of the costs to keep",
            hint="sub_models=2, sub_models=[0.7, 0.4]; own routes are cuts={'small': SubModel(drop=['a:b'])}",
        )
    shares = [float(share) for share in sub_models]
    return _named(choose_routes(traced, shares, stepdown, costs, importance))


def _named(routes: Sequence[SubModel]) -> dict[str, SubModel]:
    """`sub0`, `sub1`, …"""
    return {f"sub{i}": sub for i, sub in enumerate(routes)}


def _spread_routes(chain: _Chain, ways: Sequence[_Way], count: int) -> list[SubModel]:
    """Routes spread evenly down to 15 % of the costs; where that is out of reach, down to the least there is."""
    try:
        return _routes(chain, ways, spread(count))
    except CutError:
        least = min((way.cost for way in ways if way.spans), default=chain.total) / max(chain.total, 1e-300)
        if not 0 < least < 1:
            raise
        return _routes(chain, ways, spread(count, (1 + least) / 2, least))


def choose_routes(
    traced: TracedModel,
    keep: Sequence[float],
    stepdown: str | Stem = "conv",
    costs: Mapping[str, float] | None = None,
    importance: Mapping[str, float] | None = None,
) -> list[SubModel]:
    """The routes within shares of the base-model's costs that lose least.

    Without a measured importance what is lost is a rule: a stage is what has one shape; leaving out n of its N
    blocks loses (n/N)², so that what is left out is spread over the stages; a span that needs a layer in its place
    loses as much as a stage; and parting early loses, because what is in front is shared with all its statistics.

    Args:
        traced: The model.
        keep: Shares of the base-model's costs, each in (0, 1), falling.
        stepdown: What a route that begins behind the image takes it in through.
        costs: Cost of each segment by the name of the place it ends at, as `measure_segments` gives them; MACs if
            None.
        importance: Loss of leaving out each span alone, as `span_importance` gives it; the rule if None.

    Raises:
        CutError: A share is out of range, or no route within it is left.
    """
    if any(not 0 < share < 1 for share in keep) or list(keep) != sorted(keep, reverse=True):
        raise CutError(
            f"sub_models={list(keep)}: shares of the base-model's costs lie between 0 and 1 and fall",
            hint="sub_models=[0.7, 0.4]",
        )
    chain = _Chain(traced, stepdown, costs, importance)
    return _routes(chain, _ways(chain), keep)


def _routes(chain: _Chain, ways: Sequence[_Way], keep: Sequence[float]) -> list[SubModel]:
    """The ways within shares of a chain's costs that lose least, each another."""
    chosen: list[_Way] = []
    for share in keep:
        most = min([share * chain.total * (1 + 1e-9), *(way.cost for way in chosen)])
        within = [way for way in ways if way.spans and way.cost <= most and way not in chosen]
        if not within:
            least = min((way.cost for way in ways if way.spans), default=chain.total) / max(chain.total, 1e-300)
            more = f" that is not a larger sub-model's, {chain.drop(chosen[-1])}" if chosen else ""
            raise CutError(
                f"{chain.model} has no route with {100 * share:.3g} % of its costs{more}",
                hint=f"the least is {100 * least:.1f} %; detachnet.find_spans(model) lists what can be left out",
            )
        chosen.append(min(within, key=lambda way: (way.loss, way.cost)))
    return [SubModel(drop=chain.drop(way)) for way in chosen]


def _ways(chain: _Chain) -> list[_Way]:
    """The ways through a chain that no other beats in cost and loss."""
    count = len(chain.places)
    at: list[list[_Way]] = [[] for _ in range(count + 1)]
    at[0] = [_Way()]
    for i in range(count):
        free = _unbeaten([way for way in at[i] if not chain.has_left(way, i)], chain.total)
        busy = _unbeaten([way for way in at[i] if chain.has_left(way, i)], chain.total)
        step = chain.step(i + 1)
        at[i + 1] += [_Way(way.loss, way.cost + step, way.spans) for way in free + busy]
        for j in chain.spans_from(i):
            bridge = chain.bridge(i, j)
            if bridge is None or chain.upto[j] - chain.upto[i] <= bridge:
                continue
            loss, parts = chain.loss(i, j), chain.parting(i)
            at[j] += [
                _Way(way.loss + loss + (_TIE if way.spans else 1) * parts, way.cost + bridge, (*way.spans, (i, j)))
                for way in free
            ]
    return _unbeaten(at[count], chain.total)


def _unbeaten(ways: list[_Way], total: float) -> list[_Way]:
    """Of some ways those that no cheaper one loses less than."""
    kept: list[_Way] = []
    for way in sorted(ways, key=lambda way: (int(_STEPS * way.cost / max(total, 1e-300)), way.loss, way.cost)):
        if not kept or way.loss < kept[-1].loss:
            kept.append(way)
    return kept
