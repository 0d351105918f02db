"""`detachnet inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .console import friendly, note, plan_table, table

if TYPE_CHECKING:
    from detachnet.cuts import CutPoint


@friendly
def inspect(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or detachnet:NAME.")],
    cut: Annotated[list[str] | None, typer.Option(help="Show the plan for this cut; repeatable.")] = None,
    input_size: Annotated[
        str | None,
        typer.Option(metavar="C,H,W", help="Shape of one image; what the model declares if not given."),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Size of the output.")] = None,
) -> None:
    """Show where a model can be cut, and what each sub-model would cost."""
    size = _parse_size(input_size)
    import detachnet

    kwargs = {} if num_classes is None else {"num_classes": num_classes}
    network = detachnet.create_model(model, **kwargs)
    if cut:
        plan_table(detachnet.make_detachable(network, cut, size))
        return
    points = detachnet.find_cuts(network, size)
    header = ("cut", "feature", "step-down", "MACs", "parameters")
    table(f"{model}: {len(points)} valid cuts", header, map(_row, points), left=3)
    note(f"\nPlan a family: detachnet inspect {model} --cut NAME --cut NAME")


def _row(point: CutPoint) -> tuple[str, ...]:
    from detachnet.plan import si

    shape = "×".join(map(str, point.shape))
    return (
        point.name,
        shape,
        str(point.stepdown),
        si(point.macs),
        si(point.num_params),
    )


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
