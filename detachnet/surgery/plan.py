"""DetachPlan: what a family will be, before anything is built. Frozen, printable, saveable."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from pydantic import computed_field, model_validator
from torch import fx, nn

from detachnet.errors import CutError, StepDownError, WidthError
from detachnet.fields import Fields
from detachnet.surgery.cuts import TOLD, CutAnalysis, choose_cuts, prepared_at, spread
from detachnet.surgery.figures import drawn
from detachnet.surgery.graph import TracedModel
from detachnet.surgery.routes import (
    HALF,
    Filters,
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
    StepDown,
    StepDownBuilder,
    build_custom,
    build_stepdown,
    plan_bridge,
    plan_stepdown,
)
from detachnet.surgery.widths.slicing import narrow_graph
from detachnet.surgery.widths.storing import Narrowing
from detachnet.text import Table, by, si

BASE = "base"
_EMPTY = nn.Module()
Norm = Literal["private", "shared"]
Head = Literal["private", "shared"]
Cuts = Sequence[str] | Sequence[float] | Mapping[str, str | SubModel] | int | str


class PlannedSpan(Fields):
    """A part of the base-model that a sub-model leaves out.

    Attributes:
        start: It begins behind this cut; empty for the image.
        end: The last cut that is left out.
        prepared: Whether it begins where the image is prepared for the first layer with weights.
        bridge: What stands for it; None where both ends have the same shape, so that nothing does.
        begins: Multiply-accumulates of the base-model in front of it.
        ends: Multiply-accumulates of the base-model up to its end.
    """

    start: str = ""
    end: str
    prepared: bool = False
    bridge: StepDown | None = None
    begins: int = 0
    ends: int = 0

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


class ModelPlan(Fields):
    """One model of a family.

    Attributes:
        name: `base`, `sub0`, `sub1`, …, or the user's own name.
        spans: What it leaves out, front to back; nothing for the base-model.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters when detached.
        shared_macs: Multiply-accumulates in front of where it parts from the base-model, which run once for both.
        own_params: Number of parameters that are not the base-model's: bridges, private norms and head.
        width: The share of the filters that was asked for, of all groups or by name; 1 for all of them.
        filters: Which were asked for.
        kept: Group of filters → how many of its units there are, the first; or which, as the bits of a hexadecimal
            number, the first unit the lowest. All of those that are not named.
    """

    name: str
    spans: tuple[PlannedSpan, ...] = ()
    macs: int
    num_params: int
    shared_macs: int = 0
    own_params: int = 0
    width: float | dict[str, float] = 1.0
    filters: Filters = "first"
    kept: dict[str, int | str] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_a_cut(cls, fields: Any) -> Any:
        """Plans of before there were spans say `cut` and `stepdown`."""
        if not isinstance(fields, dict) or "cut" not in fields:
            return fields
        rest = {key: value for key, value in fields.items() if key not in ("cut", "stepdown")}
        if "spans" in rest:
            return rest
        spans = [] if fields["cut"] is None else [{"end": fields["cut"], "bridge": fields.get("stepdown")}]
        return rest | {"spans": spans}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cut(self) -> str | None:
        """Everything up to and including this node is dropped; None if the front is not."""
        first = self.spans[0] if self.spans else None
        return first.end if first and (not first.start or first.prepared) else None

    @property
    def stepdown(self) -> StepDown | None:
        """The layer the image enters through instead of the front; None if that is not dropped."""
        return self.spans[0].bridge if self.cut is not None else None

    @property
    def is_cut(self) -> bool:
        """Whether the front is all that it leaves out."""
        return self.cut is not None and len(self.spans) == 1 and not self.kept

    @property
    def asked(self) -> SubModel:
        """What `make_detachable` makes the same model of."""
        spans = [str(span) for span in self.spans]
        return SubModel(drop=spans, width=self.width, filters=self.filters).keeping(self.kept)

    @property
    def width_text(self) -> str:
        """Its width as tables show it; empty for all filters."""
        if not self.kept:
            return ""
        groups = self.width if isinstance(self.width, dict) else {}
        first = next(iter(groups.items()), ("", self.width))
        shown = f"{first[0]} {first[1]:g}".strip()
        more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
        return shown + more + (f", {self.filters}" if self.filters != "first" else "")


class DetachPlan(Fields):
    """A family: the base-model and its sub-models, in the order of their cuts through the network.

    Attributes:
        model: Class of the base-model.
        input_size: Shape of one image, `(C, H, W)`.
        norm: `private` (each sub-model has its own batch norms) or `shared` (the paper's).
        head: The same of the last layer with weights, which makes the output.
        models: The base-model first.
        hints: What is legal but worth a second thought.
        joint_macs: Multiply-accumulates for one image of all models in one pass, where what they share runs once.
        whole: Path of a module that is kept whole for what its forward does → what that is.
        checked: What was not compared with the model, and what was found to join the images of a batch; empty
            where everything was compared and nothing found.
    """

    model: str
    input_size: tuple[int, ...]
    norm: Norm
    models: tuple[ModelPlan, ...]
    hints: tuple[str, ...] = ()
    head: Head = "shared"
    joint_macs: int = 0
    checked: str = ""
    whole: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """`("base", "sub0", …)`."""
        return tuple(model.name for model in self.models)

    def __getitem__(self, name: str) -> ModelPlan:
        return next(model for model in self.models if model.name == name)

    @property
    def is_narrow(self) -> bool:
        """Whether a model has fewer filters than the base-model."""
        return any(model.kept for model in self.models)

    @property
    def entry(self) -> str | Stem:
        """What `stepdown=` was when the family was made; flat features get a linear layer whatever that was."""
        entries = [model.stepdown for model in self.models if model.stepdown and model.stepdown.kind != "linear"]
        return next((entry.stem or entry.kind for entry in entries), "conv")

    @property
    def title(self) -> str:
        """The heading of the table."""
        size = "×".join(map(str, self.input_size))
        heads = ", private heads" if self.head == "private" else ""
        return f"{self.model} on {size} images, {self.norm} batch norms{heads}"

    @property
    def table(self) -> Table:
        """One row per model."""
        front_only = all(model.is_cut for model in self.models[1:])
        header: tuple[str, ...] = (
            "model",
            "left out",
            "bridges",
            "MACs",
            "of base",
            "shared",
            "parameters",
            "own",
        )
        if self.is_narrow:
            header = (*header[:2], "width", *header[2:])
        if front_only:
            header = ("model", "cut", "feature", "step-down", "MACs", "of base", "parameters")
        rows = tuple(self._front(model) if front_only else self._route(model) for model in self.models)
        hints = [f"hint: {hint}" for hint in self.hints]
        checked = [f"checked: {self.checked}"] if self.checked else []
        whole = [f"kept whole: {self._whole}"] if self.whole else []
        return Table(header, rows, self.title, (*whole, *hints, *checked), left=header.index("MACs"))

    @property
    def _whole(self) -> str:
        """What is kept whole and why."""
        said = [f"{path!r} ({why})" for path, why in self.whole.items()]
        return ", ".join(said[:6]) + (f" and {len(said) - 6} more" if len(said) > 6 else "")

    def _front(self, model: ModelPlan) -> tuple[str, ...]:
        """A row of a family whose sub-models drop the front."""
        entry = model.stepdown
        feature, text = (by(entry.feature), str(entry)) if entry else ("", "")
        return (model.name, model.cut or "", feature, text, *self._costs(model), si(model.num_params))

    def _route(self, model: ModelPlan) -> tuple[str, ...]:
        """A row of a family with other routes."""
        spans = ", ".join(map(str, model.spans))
        bridges = ", ".join("–" if span.bridge is None else str(span.bridge) for span in model.spans)
        width = (model.width_text,) if self.is_narrow else ()
        is_sub = bool(model.spans or model.kept)
        shared, own = (si(model.shared_macs), si(model.own_params)) if is_sub else ("", "")
        return (model.name, spans, *width, bridges, *self._costs(model), shared, si(model.num_params), own)

    def _costs(self, model: ModelPlan) -> tuple[str, str]:
        """Multiply-accumulates, and their share of the base-model's."""
        return si(model.macs), f"{100 * model.macs / max(1, self.models[0].macs):.0f} %"

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(drawn(self))


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
    hints = [*prepares, *_all_hints(analysis, models), *_missed_shares(models, cuts)]
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
            graph = narrow_graph(narrowing.restore(kept[name]))
            made[key] = _Kin(CutAnalysis(graph), {}, is_narrow=True)
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
    total, tail = sum(full.traced.macs.values()), full.tail_macs(full.find(end))
    begins = total - full.tail_macs(full.find(start)) if start else 0
    inside = bool(start) and not prepared
    if not start and not analysis.traced.image.dtype.is_floating_point:
        raise StepDownError(
            f"no step-down takes in images of {analysis.traced.image.dtype}",
            hint=f"begin behind what makes numbers of them: drop=['{full.preparation.end or '…'}:{end}']",
        )
    if inside and before == after:
        return PlannedSpan(start=start, end=end, begins=begins, ends=total - tail)
    if isinstance(stepdown, str | Stem):
        bridge = plan_bridge(image, before, after) if inside else plan_stepdown(before, after, stepdown)
        assert bridge is not None  # shapes differ
        module = build_stepdown(bridge)
    else:
        bridge, module = build_custom(stepdown, before, after)
    modules.setdefault(place, module)
    return PlannedSpan(start=start, end=end, prepared=prepared, bridge=bridge, begins=begins, ends=total - tail)


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
    own = sum(bridge.num_params for bridge in bridges)
    if apart is not None:
        norm_params = analysis.norm_params(lambda at: at > apart and not any(at in span for span in route))
        if kin.is_narrow and norm_params and norm == "shared":
            raise WidthError(
                f"{name} cannot share the base-model's batch norms: its features have other statistics",
                hint="norm='private'",
            )
        own += norm_params if norm == "private" else 0
    return ModelPlan(
        name=name,
        spans=spans,
        macs=macs + sum(bridge.macs for bridge in bridges),
        num_params=num_params + sum(bridge.num_params for bridge in bridges),
        shared_macs=0 if apart is None else analysis.costs(lambda at: at <= apart)[0],
        own_params=own,
    )


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
    if not isinstance(cuts, Mapping | Sequence | int):
        raise CutError(f"cuts={cuts!r}: give a list of names, a dict, a number of sub-models, or shares of MACs")
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
        raise CutError(f"a cut is the name of a node, not {cut!r}", hint="detachnet.find_cuts(model) lists them")
    return cut


def _all_hints(analysis: CutAnalysis, models: Sequence[ModelPlan]) -> list[str]:
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


def _missed_shares(models: Sequence[ModelPlan], cuts: Cuts) -> list[str]:
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
