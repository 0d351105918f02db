"""`detachnet inspect`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detachnet.errors import ModelError

from .console import friendly, note, plan_table, print_json, table

if TYPE_CHECKING:
    from torch import nn

    from detachnet.cuts import CutPoint

PLACES = {"activation": "best", "module": "good", "inner": "fair"}


@friendly
def inspect(
    model: Annotated[
        str, typer.Argument(help="torchvision:NAME, timm:NAME, detachnet:NAME, or path/to/file.py:FUNCTION.")
    ],
    cut: Annotated[
        list[str] | None,
        typer.Option(
            help="Show the plan for this cut; repeatable. A name; 'auto' or a number of sub-models; or a share of "
            "the MACs to keep, such as 0.7."
        ),
    ] = None,
    input_size: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Shape of one image; what the model declares if not given.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Size of the output.")] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Every node, also inside modules, and why it is no cut.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show where a model can be cut, and what each sub-model would cost."""
    size = _parse_size(input_size)
    network = _network(model, num_classes)
    import detachnet

    if cut:
        plan = detachnet.make_detachable(network, _parse_cuts(cut), size).plan
        print_json(plan.model_dump(mode="json")) if as_json else plan_table(plan)
        return
    from detachnet.cuts import cut_points, every_node
    from detachnet.trace import trace

    traced = trace(network, size)
    points = cut_points(traced)
    if as_json:
        print_json([_record(point) for point in points])
    elif show_all:
        valid = {point.name: point for point in points}
        rows = [(name, _by(shape), _price(valid.get(name)), why) for name, shape, why in every_node(traced)]
        columns = ("node", "feature", "MACs of base", "why it is no cut")
        table(f"{model}: {len(rows)} nodes, {len(points)} valid cuts", columns, rows, left=4)
    else:
        shown = [point for point in points if point.place != "inner"] or points
        header = ("cut", "place", "feature", "reduction", "step-down", "MACs", "of base", "parameters")
        table(f"{model}: {len(points)} valid cuts, {len(shown)} behind modules", header, map(_row, shown), left=3)
        note(
            "\nbest: behind an activation or pooling that ends a module; good: behind another module; more: --all"
        )
        note(f"Plan a family: detachnet inspect {model} --cut auto, or --cut NAME --cut NAME")


def _network(model: str, num_classes: int | None) -> nn.Module:
    """A model of the zoo, or what a function of a user's file returns."""
    path, colon, function = model.rpartition(":")
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if not path.endswith(".py"):
        import detachnet

        return detachnet.create_model(model, **kwargs)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not colon or spec is None or spec.loader is None or not Path(path).is_file():
        raise ModelError(f"there is no file {path}", hint="path/to/file.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ModelError(f"{path} has no function {function!r} that makes a model")
    try:
        network: nn.Module = getattr(module, function)(**kwargs)
    except TypeError as error:
        raise ModelError(f"{function} of {path} cannot be called with {kwargs}", what=str(error)) from error
    return network


def _parse_cuts(cuts: list[str]) -> Any:
    """`auto`, a number of sub-models, shares of MACs, or names."""
    if cuts == ["auto"]:
        return "auto"
    if len(cuts) == 1 and cuts[0].isdecimal():
        return int(cuts[0])
    try:
        shares = [float(cut) for cut in cuts]
    except ValueError:
        return cuts
    return cuts if all(share >= 1 for share in shares) else shares  # `3` may be a module of an nn.Sequential


def _record(point: CutPoint) -> dict[str, Any]:
    fields = {
        name: getattr(point, name) for name in ("name", "place", "shape", "macs", "macs_of_base", "num_params")
    }
    return fields | {"reduction": point.stepdown.reduction, "stepdown": point.stepdown.model_dump(mode="json")}


def _row(point: CutPoint) -> tuple[str, ...]:
    from detachnet.plan import si

    reduction = "" if point.stepdown.reduction is None else f"{point.stepdown.reduction:g}"
    share = f"{100 * point.macs_of_base:.0f} %"
    return (
        point.name,
        PLACES[point.place],
        _by(point.shape),
        reduction,
        str(point.stepdown),
        si(point.macs),
        share,
        si(point.num_params),
    )


def _price(point: CutPoint | None) -> str:
    return "" if point is None else f"{100 * point.macs_of_base:.0f} %"


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


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
