"""DetachPlan: what a family will be, before anything is built. Frozen, printable, saveable."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import fx, nn

from detachnet.cuts import CutAnalysis, choose_cuts, spread
from detachnet.errors import CutError
from detachnet.stepdown import Stem, StepDown, StepDownBuilder, build_custom, build_stepdown, plan_stepdown
from detachnet.trace import TracedModel

BASE = "base"
_EMPTY = nn.Module()
Norm = Literal["private", "shared"]
Head = Literal["private", "shared"]
Cuts = Sequence[str] | Sequence[float] | Mapping[str, str] | int | str


class ModelPlan(BaseModel):
    """One model of a family.

    Attributes:
        name: `base`, `sub0`, `sub1`, …, or the user's own name.
        cut: Everything up to and including this node is dropped; None for the base-model.
        stepdown: The layer the image enters through instead; None for the base-model.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters when detached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    cut: str | None
    stepdown: StepDown | None
    macs: int
    num_params: int


class DetachPlan(BaseModel):
    """A family: the base-model and its sub-models, in the order of their cuts through the network.

    Attributes:
        model: Class of the base-model.
        input_size: Shape of one image, `(C, H, W)`.
        norm: `private` (each sub-model has its own batch norms) or `shared` (the paper's).
        head: The same of the last layer with weights, which makes the output.
        models: The base-model first.
        hints: What is legal but worth a second thought.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    input_size: tuple[int, ...]
    norm: Norm
    models: tuple[ModelPlan, ...]
    hints: tuple[str, ...] = ()
    head: Head = "shared"

    @property
    def names(self) -> tuple[str, ...]:
        """`("base", "sub0", …)`."""
        return tuple(model.name for model in self.models)

    def __getitem__(self, name: str) -> ModelPlan:
        return next(model for model in self.models if model.name == name)

    @property
    def title(self) -> str:
        """The heading of the table."""
        size = "×".join(map(str, self.input_size))
        heads = ", private heads" if self.head == "private" else ""
        return f"{self.model} on {size} images, {self.norm} batch norms{heads}"

    @property
    def header(self) -> tuple[str, ...]:
        """The columns of `rows`."""
        return ("model", "cut", "feature", "step-down", "MACs", "of base", "parameters")

    def rows(self) -> list[tuple[str, ...]]:
        """One row of text per model."""
        base = self.models[0]
        rows: list[tuple[str, ...]] = []
        for model in self.models:
            entry = model.stepdown
            rows.append(
                (
                    model.name,
                    model.cut or "",
                    "×".join(map(str, entry.feature)) if entry else "",
                    str(entry) if entry else "",
                    si(model.macs),
                    f"{100 * model.macs / max(1, base.macs):.0f} %",
                    si(model.num_params),
                )
            )
        return rows

    def __str__(self) -> str:
        hints = [f"hint: {hint}" for hint in self.hints]
        return "\n".join([self.title, *align([self.header, *self.rows()]), *hints])


def si(count: int) -> str:
    """A count with three to five digits and its unit: `313.2 M`, `4.9 k`."""
    if count < 1000:
        return str(count)
    return f"{count / 1e6:,.1f} M" if count >= 999_950 else f"{count / 1e3:.1f} k"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines with aligned columns; columns of numbers stand on the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1].isdigit() for cell in column[1:] if cell) and any(column[1:]) for column in columns]
    numeric = [n and "×" not in "".join(c) for n, c in zip(numeric, columns, strict=True)]
    return [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in rows
    ]


def make_plan(
    traced: TracedModel,
    cuts: Cuts,
    norm: Norm,
    stepdown: str | Stem | StepDownBuilder = "conv",
    head: Head = "shared",
) -> tuple[DetachPlan, dict[str, nn.Module]]:
    """Check the cuts and work out what each sub-model will be.

    Args:
        traced: The model.
        cuts: As `make_detachable` takes them.
        norm: `private` or `shared`.
        stepdown: `conv`, `stem`, a `Stem`, `identity` or a user's own.
        head: `private` or `shared`.

    Returns:
        The plan, and each sub-model's step-down, newly initialized.

    Raises:
        CutError: A cut is unknown, crossed, repeated, out of order or at the output.
        StepDownError: A feature map that no step-down can produce.
    """
    analysis = CutAnalysis(traced.eval)
    named = _named(traced, cuts)
    nodes = {name: analysis.find(cut) for name, cut in named.items()}
    _check_order(analysis, named, nodes)
    image = traced.eval.image.shape[1:]
    total_macs, total_params = sum(traced.eval.macs.values()), _num_params(traced.eval.root)
    models = [ModelPlan(name=BASE, cut=None, stepdown=None, macs=total_macs, num_params=total_params)]
    modules: dict[str, nn.Module] = {}
    hints: list[str] = []
    for name, node in nodes.items():
        if isinstance(stepdown, str | Stem):
            entry = plan_stepdown(image, analysis.shape(node), stepdown)
            modules[name] = build_stepdown(entry)
        else:
            entry, modules[name] = build_custom(stepdown, image, analysis.shape(node))
        macs = entry.macs + analysis.tail_macs(node)
        num_params = entry.num_params + analysis.tail_params(node)
        models.append(ModelPlan(name=name, cut=named[name], stepdown=entry, macs=macs, num_params=num_params))
        hints += _hints(analysis, name, named[name], node)
        if entry.stem and macs >= models[-2].macs:
            hints.append(f"{name} costs no less than {models[-2].name}: its stem wants less width")
    plan = DetachPlan(
        model=traced.class_name,
        input_size=image,
        norm=norm,
        head=head,
        models=tuple(models),
        hints=tuple(hints),
    )
    return plan, modules


def _named(traced: TracedModel, cuts: Cuts) -> dict[str, str]:
    """Sub-model name -> cut; `sub0`, `sub1`, … unless the user chose names."""
    if cuts == "auto":
        cuts = 2
    if isinstance(cuts, str):
        raise CutError(f"cuts is a list of names, not a string: write cuts=[{cuts!r}]", hint="or cuts='auto'")
    if not isinstance(cuts, Mapping | Sequence | int):
        raise CutError(f"cuts={cuts!r}: give a list of names, a dict, a number of sub-models, or shares of MACs")
    if isinstance(cuts, int):
        if cuts < 1:
            raise CutError(f"cuts={cuts}: a family has at least one sub-model")
        cuts = choose_cuts(traced, spread(cuts))
    elif not isinstance(cuts, Mapping) and cuts and all(isinstance(cut, float) for cut in cuts):
        cuts = choose_cuts(traced, [float(cut) for cut in cuts])
    named = dict(cuts) if isinstance(cuts, Mapping) else {f"sub{i}": _cut_name(c) for i, c in enumerate(cuts)}
    for name, cut in named.items():
        _cut_name(cut)
        taken = name in (BASE, "all") or keyword.iskeyword(name) or hasattr(_EMPTY, name)
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


def _hints(analysis: CutAnalysis, name: str, cut: str, node: fx.Node) -> list[str]:
    """What is legal about a cut but worth a second thought."""
    hints = []
    if (calls := analysis.call_count(cut)) > 1:
        hints.append(f"{cut!r} is called {calls} times; the first call is meant, '{cut}_1' is the next")
    if analysis.splits_norm(node):
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
