"""`detachnet inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .console import friendly, note, print_json, show
from .options import AsJson

if TYPE_CHECKING:
    from torch import nn

    from detachnet.surgery.cuts import CutPoint
    from detachnet.surgery.graph import TracedModel
    from detachnet.surgery.plan import DetachPlan
    from detachnet.surgery.spans import SpanPoint
    from detachnet.surgery.widths.groups import Widths

PLACES = {"activation": "best", "module": "good", "inner": "fair"}
DEAR = "dear"
Cuts = Annotated[
    list[str] | None,
    typer.Option(
        help="Show the plan for this cut; repeatable. A name; 'auto' or a number of sub-models; or a share of the "
        "MACs to keep, such as 0.7."
    ),
]
Shares = Annotated[
    str | None,
    typer.Option(
        metavar="auto|N|SHARES",
        help="Show the plan for two or so many sub-models, or for shares of the MACs such as 0.7,0.4; what each "
        "leaves out is chosen.",
    ),
]


@friendly
def inspect(
    model: Annotated[
        str, typer.Argument(help="torchvision:NAME, timm:NAME, detachnet:NAME, or path/to/file.py:FUNCTION.")
    ],
    cut: Cuts = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="A:B", help="Show the plan for a sub-model that leaves out this span; repeatable."),
    ] = None,
    width: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="Show the plan for a sub-model with this share of the filters, such as 0.5; repeatable. "
            "With --drop it leaves out the spans, too.",
        ),
    ] = None,
    sub_models: Shares = None,
    stepdown: Annotated[
        Literal["conv", "stem"], typer.Option(help="What sub-models take in the image through, which is priced.")
    ] = "conv",
    input_size: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Shape of one image; what the model declares if not given.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Size of the output.")] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Every node, also inside modules, and why it is no cut.")
    ] = False,
    spans: Annotated[
        bool, typer.Option("--spans", help="What a sub-model can leave out, and what must stand for it.")
    ] = False,
    widths: Annotated[
        bool,
        typer.Option("--widths", help="Which filters go together, and what a narrower network can leave out."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show where a model can be cut, and what each sub-model would cost."""
    size = _parse_size(input_size)
    if sum(map(bool, (cut, drop or width, sub_models, show_all, spans, widths))) > 1:
        raise typer.BadParameter(
            "ask for one of --cut, --sub-models, --drop or --width, --all, --spans and --widths"
        )
    from detachnet.zoo import build_model

    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    network = build_model(model, **kwargs)
    import detachnet

    if cut or drop or width or sub_models:
        asked = _parse_shares(sub_models) if sub_models else None
        cuts = _left_out(drop, width) if drop or width else _parse_cuts(cut) if cut else None
        net = detachnet.make_detachable(network, cuts, size, sub_models=asked, stepdown=stepdown, check="none")
        _show_plan(net.plan, as_json, in_toml=bool(sub_models))
    elif spans:
        _show_spans(model, detachnet.find_spans(network, size), as_json)
    elif widths:
        _show_widths(model, detachnet.find_widths(network, size), as_json)
    else:
        _show_points(model, network, size, stepdown, show_all, as_json)


def _show_points(
    model: str, network: nn.Module, size: tuple[int, ...] | None, stepdown: str, show_all: bool, as_json: bool
) -> None:
    """Where a model can be cut, or every node of it."""
    from detachnet.surgery.cuts import cut_points
    from detachnet.surgery.trace import trace

    traced = trace(network, size)
    points = cut_points(traced, stepdown)
    if as_json:
        print_json([_record(point) for point in points])
    elif show_all:
        _show_nodes(model, traced, points)
    else:
        _show_cuts(model, points)


def _show_nodes(model: str, traced: TracedModel, points: list[CutPoint]) -> None:
    """Every node of a model, and why it is no cut."""
    from detachnet.surgery.cuts import every_node
    from detachnet.text import Table, by

    valid = {point.name: point for point in points}
    rows = [(name, by(shape), _price(valid.get(name)), why) for name, shape, why in every_node(traced)]
    columns = ("node", "feature", "MACs of base", "why it is no cut")
    show(Table(columns, tuple(rows), f"{model}: {len(rows)} nodes, {len(points)} valid cuts", left=4))


def _show_cuts(model: str, points: list[CutPoint]) -> None:
    """Where a model can be cut between its modules."""
    from detachnet.text import Table

    outer = [point for point in points if point.place != "inner" and not point.in_block]
    shown = outer or [point for point in points if point.place != "inner"] or points
    header = ("cut", "place", "feature", "reduction", "step-down", "MACs", "of base", "parameters")
    title = f"{model}: {len(points)} valid cuts, {len(shown)} behind modules"
    show(Table(header, tuple(map(_row, shown)), title, left=3))
    note("\nbest: behind an activation or pooling that ends a module; good: behind another module; more: --all")
    if any(point.caution for point in shown):
        note(f"{DEAR}: the step-down has more than it replaces, or only the classifier is left; never chosen")
    if shown:
        note(f"Plan a family: detachnet inspect {model} --cut auto, or --cut NAME --cut NAME")
    else:
        note("It cannot be cut; --all says of each node why.")


def _left_out(drop: list[str] | None, width: list[float] | None) -> Any:
    """The sub-models of spans and widths: one, or one for each width."""
    import detachnet

    if not width:
        return {"sub0": detachnet.SubModel(drop=drop)}
    return {f"sub{i}": detachnet.SubModel(drop=drop or (), width=share) for i, share in enumerate(width)}


def _show_plan(plan: DetachPlan, as_json: bool, in_toml: bool) -> None:
    """A plan as a table, and as a recipe has it."""
    if as_json:
        print_json(plan.model_dump(mode="json"))
        return
    show(plan.table)
    if in_toml:
        note("\nIn a recipe:")
        for model in plan.models[1:]:
            note(f"[family.models.{model.name}]\ndrop = {json.dumps([str(span) for span in model.spans])}")


def _parse_shares(text: str) -> Literal["auto"] | int | list[float]:
    """`auto`, `2` or `0.7,0.4`."""
    if text == "auto":
        return "auto"
    try:
        return int(text) if text.isdecimal() else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            "write 'auto', a number of sub-models or shares, for example 2 or 0.7,0.4", param_hint="--sub-models"
        ) from None


def _show_spans(model: str, points: list[SpanPoint], as_json: bool) -> None:
    """What a model can do without."""
    from detachnet.text import Table, by, si

    if as_json:
        bridges = ({"bridge": point.bridge and point.bridge.model_dump(mode="json")} for point in points)
        print_json([vars(point) | bridge for point, bridge in zip(points, bridges, strict=True)])
        return
    rows = (
        (
            point.name,
            by(point.shape),
            "–" if point.bridge is None else str(point.bridge),
            si(point.macs_saved),
            f"{100 * point.macs_of_base:.0f} %",
            si(point.params_saved),
        )
        for point in points
    )
    header = ("span", "feature", "bridge", "MACs saved", "of base", "parameters saved")
    show(Table(header, tuple(rows), f"{model}: {len(points)} spans to leave out", left=3))
    note("\n–: both ends have one shape, so nothing stands for it. Spans that follow each other are one.")
    note(f"Plan a sub-model: detachnet inspect {model} --drop A:B --drop C:D")


def _show_widths(model: str, groups: Widths, as_json: bool) -> None:
    """Which filters of a model go together."""
    if as_json:
        print_json([asdict(group) for group in groups])
        return
    cut = sum(not group.reason for group in groups)
    show(groups.table(f"{model}: {len(groups)} groups of filters, {cut} can be cut"))
    note("\nMACs and parameters: of all layers that make or read them; layers between two groups count in both.")


def _parse_cuts(cuts: list[str]) -> Any:
    """`auto`, a number of sub-models, shares of MACs, or names."""
    if cuts == ["auto"]:
        return "auto"
    try:
        if len(cuts) == 1 and cuts[0].isdecimal():
            return int(cuts[0])
        shares = [float(cut) for cut in cuts]
    except ValueError:
        return cuts
    return cuts if all(share >= 1 for share in shares) else shares  # `3` may be a module of an nn.Sequential


def _record(point: CutPoint) -> dict[str, Any]:
    fields = {
        name: getattr(point, name)
        for name in ("name", "place", "in_block", "caution", "shape", "macs", "macs_of_base", "num_params")
    }
    return fields | {"reduction": point.stepdown.reduction, "stepdown": point.stepdown.model_dump(mode="json")}


def _row(point: CutPoint) -> tuple[str, ...]:
    from detachnet.text import by, si

    reduction = "" if point.stepdown.reduction is None else f"{point.stepdown.reduction:g}"
    share = f"{100 * point.macs_of_base:.0f} %"
    return (
        point.name,
        DEAR if point.caution else PLACES[point.place],
        by(point.shape),
        reduction,
        str(point.stepdown),
        si(point.macs),
        share,
        si(point.num_params),
    )


def _price(point: CutPoint | None) -> str:
    return "" if point is None else f"{100 * point.macs_of_base:.0f} %"


def _parse_size(text: str | None) -> tuple[int, ...] | None:
    """`3,32,32` as numbers."""
    if text is None:
        return None
    try:
        size = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        raise typer.BadParameter(
            "write the shape of one image as C,H,W, for example 3,32,32", param_hint="--input-size"
        )
    return size
