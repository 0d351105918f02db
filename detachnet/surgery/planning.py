"""cuts, routes and widths -> DetachPlan: checked, priced, with new bridges; nothing else is built."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from detachnet.errors import CutError, StepDownError, WidthError
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.cuts import choose_cuts, prepared_at, spread
from detachnet.surgery.graph import TracedGraph, TracedModel
from detachnet.surgery.hints import all_hints, missed_shares
from detachnet.surgery.plan import BASE, Cuts, DetachPlan, Head, ModelPlan, Norm, PlannedSpan
from detachnet.surgery.routes import (
    HALF,
    Route,
    SubModel,
    bridge_place,
    check_distinct,
    find_route,
    folder,
    owner,
    parting,
)
from detachnet.surgery.stepdown import (
    Stem,
    StepDownBuilder,
    build_custom,
    build_stepdown,
    plan_bridge,
    plan_stepdown,
)
from detachnet.surgery.widths.storing import Narrowing

_EMPTY = nn.Module()


def make_plan(
    traced: TracedModel,
    cuts: Cuts,
    norm: Norm,
    stepdown: str | Stem | StepDownBuilder = "conv",
    head: Head = "shared",
    narrowing: Narrowing | None = None,
) -> tuple[DetachPlan, dict[str, nn.Module]]:
    """Check the cuts and work out what each sub-model will be.

    Args:
        traced: The model.
        cuts: As `make_detachable` takes them.
        norm: `private` or `shared`.
        stepdown: `conv`, `stem`, a `Stem`, `identity` or a user's own.
        head: `private` or `shared`.
        narrowing: What is known of its filters, and with its weights which are important.

    Returns:
        The plan, and step-downs and other bridges, newly initialized, by their place in the family.

    Raises:
        CutError: A cut is unknown, crossed, repeated, out of order or at the output, or two models are the same.
        StepDownError: A feature map that no step-down can produce.
    """
    analysis = CutAnalysis(traced.eval)
    chosen = _chosen(traced, cuts, stepdown if isinstance(stepdown, str | Stem) else "conv")
    cut_at = {name: cut for name, cut in chosen.items() if isinstance(cut, str)}
    if len(cut_at) == len(chosen):
        _check_order(analysis, cut_at, {name: analysis.find(cut) for name, cut in cut_at.items()})
    begin = prepared_at(traced, analysis)
    asked = {name: _asked(analysis, sub, begin) for name, sub in chosen.items()}
    kin, of, kept = _by_width(analysis, asked, narrowing or Narrowing(traced))
    ends, words = dict[str, list[tuple[str, str]]](), {name: sub.parts for name, sub in asked.items()}
    for name, sub in asked.items():
        ends[name], of[name].routes[name] = find_route(of[name].analysis, sub)
    for same in kin:
        check_distinct(same.routes, words)
    modules: dict[str, nn.Module] = {}
    models = [_model_plan(kin[0], BASE, (), norm)]
    for name, sub in asked.items():
        spans = tuple(
            _span(analysis, of[name], name, i, pair, stepdown, modules, prepared=pair[0] == begin != "")
            for i, pair in enumerate(ends[name])
        )
        width = {"width": sub.width, "filters": sub.filters, "kept": kept[name]} if name in kept else {}
        models.append(_model_plan(of[name], name, spans, norm).model_copy(update=width))
    first = [model.spans[0] for model in models[1:] if model.cut is not None]
    raw, prepared = any(not span.start for span in first), any(span.prepared for span in first)
    in_training = CutAnalysis(traced.train).preparation
    prepares = analysis.preparation.hints(in_training, raw=raw, prepared=prepared)
    hints = [*prepares, *all_hints(analysis, models), *missed_shares(models, cuts)]
    plan = DetachPlan(
        model=traced.class_name,
        input_size=traced.eval.image.shape[1:],
        norm=norm,
        head=head,
        models=tuple(models),
        hints=tuple(hints),
        joint_macs=sum(_joint_macs(same, models) for same in kin),
        whole=traced.whole,
    )
    return plan, modules


@dataclass
class _Kin:
    """Models of one width: they run in one pass.

    Attributes:
        analysis: Of the network of that width.
        routes: Model → what it leaves out.
    """

    analysis: CutAnalysis
    routes: dict[str, Route]
    is_narrow: bool = False

    def parts_at(self, name: str) -> int | None:
        """Where a model parts from the base-model; of another width at the image."""
        image = next(at for node, at in self.analysis.position.items() if node.op == "placeholder")
        return image if self.is_narrow else parting((), self.routes[name])


def _asked(analysis: CutAnalysis, sub: str | SubModel, prepared: str) -> SubModel:
    """A cut as what it leaves out: it begins behind what prepares the image, unless it is in there itself."""
    if isinstance(sub, SubModel):
        return sub
    behind = prepared and analysis.position[analysis.find(prepared)] < analysis.position[analysis.find(sub)]
    return SubModel(drop=[f"{prepared if behind else ''}:{sub}"])


def _by_width(
    analysis: CutAnalysis, asked: Mapping[str, SubModel], narrowing: Narrowing
) -> tuple[list[_Kin], dict[str, _Kin], dict[str, dict[str, int | str]]]:
    """The models by their widths, those of full width first; that of each model; and what narrower ones keep."""
    kept = {name: narrowing.stored(name, sub) for name, sub in asked.items() if sub.is_narrow}
    made = {frozenset[tuple[str, int | str]](): _Kin(analysis, {BASE: ()})}
    of: dict[str, _Kin] = {}
    for name in asked:
        key = frozenset(kept.get(name, {}).items())
        if key not in made:
            made[key] = _Kin(CutAnalysis(narrowing.restore(kept[name])[1]), {}, is_narrow=True)
        of[name] = made[key]
    return list(made.values()), of, kept


def _span(
    full: CutAnalysis,
    kin: _Kin,
    name: str,
    number: int,
    ends: tuple[str, str],
    stepdown: str | Stem | StepDownBuilder,
    modules: dict[str, nn.Module],
    *,
    prepared: bool,
) -> PlannedSpan:
    """A span with its bridge; the module goes to `modules`, unless another model has it already."""
    start, end = ends
    analysis = kin.analysis
    image, after = analysis.traced.image.shape[1:], analysis.shape(analysis.find(end))
    before = analysis.shape(analysis.find(start)) if start else image
    place = bridge_place(analysis.traced, kin.routes, name, number)
    costs = _costs_in_front(full, start, end)
    inside = bool(start) and not prepared
    if not start and not analysis.traced.image.dtype.is_floating_point:
        raise StepDownError(
            f"no step-down takes in images of {analysis.traced.image.dtype}",
            hint=f"begin behind what makes numbers of them: drop=['{full.preparation.end or '…'}:{end}']",
        )
    if inside and before == after:
        return PlannedSpan(start=start, end=end, **costs)
    if isinstance(stepdown, str | Stem):
        bridge = plan_bridge(image, before, after) if inside else plan_stepdown(before, after, stepdown)
        assert bridge is not None  # shapes differ
        module = build_stepdown(bridge)
    else:
        bridge, module = build_custom(stepdown, before, after)
    modules.setdefault(place, module)
    return PlannedSpan(start=start, end=end, prepared=prepared, bridge=bridge, **costs)


def _costs_in_front(full: CutAnalysis, start: str, end: str) -> dict[str, int]:
    """The base-model's multiply-accumulates in front of where a span begins, and of where it ends."""
    total, places = sum(full.traced.macs.values()), {"begins": start, "ends": end}
    return {key: total - full.tail_macs(full.find(place)) if place else 0 for key, place in places.items()}


def _model_plan(kin: _Kin, name: str, spans: tuple[PlannedSpan, ...], norm: Norm) -> ModelPlan:
    """What a model costs."""
    analysis, route = kin.analysis, kin.routes[name]
    bridges = [span.bridge for span in spans if span.bridge is not None]
    macs, num_params = analysis.costs(lambda at: not any(at in span for span in route))
    if name == BASE:
        macs, num_params = sum(analysis.traced.macs.values()), _num_params(analysis.traced.root)
    elif not num_params + sum(bridge.num_params for bridge in bridges):
        raise CutError(
            f"{name} would have no layer with weights: {', '.join(map(str, spans))} leaves out all of them"
        )
    apart = kin.parts_at(name)
    if kin.is_narrow and norm == "shared" and analysis.has_norms(lambda at: not any(at in span for span in route)):
        raise WidthError(
            f"{name} cannot share the base-model's batch norms: its features have other statistics",
            hint="norm='private'",
        )
    return ModelPlan(
        name=name,
        spans=spans,
        macs=macs + sum(bridge.macs for bridge in bridges),
        num_params=num_params + sum(bridge.num_params for bridge in bridges),
        shared_macs=0 if apart is None else analysis.costs(lambda at: at <= apart)[0],
    )


def recounted(plan: DetachPlan, graphs: Mapping[str, tuple[TracedGraph, Mapping[str, Route]]]) -> DetachPlan:
    """A plan with the costs that its models have now.

    Args:
        plan: The plan.
        graphs: Model → the graph of its width in evaluation mode, and what each model of that width leaves out.
    """
    kin = {id(graph): _Kin(CutAnalysis(graph), dict(routes), False) for graph, routes in graphs.values()}
    full, models = kin[id(graphs[BASE][0])].analysis, []
    for model in plan.models:
        same = kin[id(graphs[model.name][0])]
        same.is_narrow = bool(model.kept)
        spans = tuple(s.model_copy(update=_costs_in_front(full, s.start, s.end)) for s in model.spans)
        now = _model_plan(same, model.name, spans, plan.norm)
        counts = {key: getattr(now, key) for key in ("spans", "macs", "num_params", "shared_macs")}
        models.append(model.model_copy(update=counts))
    joint = sum(_joint_macs(same, models) for same in kin.values())
    return plan.model_copy(update={"models": tuple(models), "joint_macs": joint})


def _joint_macs(kin: _Kin, models: Sequence[ModelPlan]) -> int:
    """Multiply-accumulates of one pass through all models of a width."""
    total, analysis, routes = 0, kin.analysis, kin.routes
    for node, at in analysis.position.items():
        running = [name for name, route in routes.items() if not any(at in span for span in route)]
        total += analysis.traced.macs[node] * len({owner(routes, name, at) for name in running})
    bridges = {
        bridge_place(analysis.traced, routes, model.name, i): span.bridge.macs
        for model in models
        if model.name in routes
        for i, span in enumerate(model.spans)
        if span.bridge is not None
    }
    return total + sum(bridges.values())


def _chosen(traced: TracedModel, cuts: Cuts, entry: str | Stem) -> dict[str, str | SubModel]:
    """Sub-model name -> cut, or what it leaves out; `sub0`, `sub1`, … unless the user chose names."""
    if cuts == "auto":
        cuts = 2
    if isinstance(cuts, str):
        raise CutError(f"cuts is a list of names, not a string: write cuts=[{cuts!r}]", hint="or cuts='auto'")
    if not isinstance(cuts, Mapping | Sequence | int) or isinstance(cuts, bool):
        raise CutError(
            f"cuts={cuts!r}: give a list of names, a dict, a number of sub-models, or shares of MACs",
            hint="cuts='auto', cuts=2, cuts=[0.7, 0.4]; detachnet.find_cuts(model) lists the names",
        )
    if isinstance(cuts, int):
        if cuts < 1:
            raise CutError(f"cuts={cuts}: a family has at least one sub-model")
        cuts = choose_cuts(traced, spread(cuts), entry)
    elif not isinstance(cuts, Mapping) and cuts and all(isinstance(cut, float) for cut in cuts):
        cuts = choose_cuts(traced, [float(cut) for cut in cuts], entry)
    named: dict[str, str | SubModel] = (
        dict(cuts) if isinstance(cuts, Mapping) else {f"sub{i}": _cut_name(c) for i, c in enumerate(cuts)}
    )
    for name, cut in named.items():
        if not isinstance(cut, SubModel):
            _cut_name(cut)
        taken = name in (BASE, "all", HALF) or keyword.iskeyword(name) or hasattr(_EMPTY, folder(name))
        if taken or not name.isidentifier():
            raise CutError(
                f"a sub-model cannot be called {name!r}",
                hint="use a plain identifier such as 'small', other than 'base' and 'all'",
            )
    return named


def _cut_name(cut: object) -> str:
    """A cut, if it is the name of one."""
    if not isinstance(cut, str):
        shares = "; shares of MACs are cuts=[0.7, 0.4]" if isinstance(cut, int | float) else ""
        raise CutError(
            f"a cut is the name of a node, not {cut!r}", hint=f"detachnet.find_cuts(model) lists them{shares}"
        )
    return cut


def _check_order(analysis: CutAnalysis, named: dict[str, str], nodes: dict[str, fx.Node]) -> None:
    """Cuts go front to back, each once."""
    for (name, node), (next_name, next_node) in zip(
        list(nodes.items())[:-1], list(nodes.items())[1:], strict=True
    ):
        here, there = named[name], named[next_name]
        if node is next_node:
            raise CutError(f"the cuts {here!r} and {there!r} are the same place", node=there)
        if analysis.position[node] > analysis.position[next_node]:
            right = sorted(named.values(), key=lambda cut: analysis.position[analysis.find(cut)])
            raise CutError(
                f"cuts go front to back, but {here!r} comes after {there!r}",
                hint=f"cuts={right}",
                node=here,
            )


def _num_params(module: nn.Module) -> int:
    """Number of parameters, each counted once."""
    return sum(p.numel() for p in module.parameters())
