"""metrics of a run -> its final table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from detachnet.errors import CheckpointError
from detachnet.fields import read_error
from detachnet.storage import read_file
from detachnet.surgery.plan import DetachPlan
from detachnet.text import Table, parse_json, si

_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Loss = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    macs: Annotated[int, Field(ge=0)]
    macs_of_base: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    num_params: Annotated[int, Field(ge=0)]
    best_accuracy: _Share
    best_epoch: Annotated[int, Field(gt=0)]
    last_accuracy: _Share


class _Metrics(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    epoch: Annotated[int, Field(gt=0)]
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    train_loss: dict[str, _Loss]
    test_loss: dict[str, _Loss] = {}
    test_accuracy: dict[str, _Share]


_Info = dict[str, str | int | float | None]


def read_results(path: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """The final table of a run, `results.json`.

    Raises:
        CheckpointError: It is damaged, or of other models.
    """
    rows = _read(path, list[_Result])
    if [row.model for row in rows] != list(models):
        raise CheckpointError(f"{path} is damaged", what=f"it is not of the models {', '.join(models)}")
    return [row.model_dump() for row in rows]


def read_metrics(path: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of a run's epochs, `metrics.jsonl`; none if there is no file.

    Raises:
        CheckpointError: It is damaged, or of other models.
    """
    rows = _read(path, list[_Metrics], lines=True) if path.exists() else []
    for row in rows:
        if missing := set(models) - set(row.test_accuracy):
            raise CheckpointError(f"{path} is damaged", what=f"epoch {row.epoch} is not of {min(missing)!r}")
    return [row.model_dump() for row in rows]


def read_info(path: Path) -> dict[str, Any]:
    """Hardware, versions and seconds of a run, `run.json`; nothing if there is no file.

    Raises:
        CheckpointError: It is damaged.
    """
    return _read(path, _Info) if path.exists() else {}


def _read(path: Path, kind: Any, lines: bool = False) -> Any:
    """A JSON file of a run, or one with JSON in each line, checked."""
    value: Any = None
    try:
        content = read_file(path)
        value = [parse_json(line) for line in content.splitlines()] if lines else parse_json(content)
        return TypeAdapter(kind).validate_python(value)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged", what=read_error(error, value)) from error


def result_rows(
    plan: DetachPlan, models: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The final table of a run.

    Args:
        plan: The family.
        models: The models that were trained.
        rows: The run's metrics, one row per epoch.

    Returns:
        Per model: `macs` and `num_params`, the best test accuracy over the epochs and its epoch (the paper's
        protocol, which chooses on the test set), and the last epoch's (the honest one); accuracies in [0, 1].
    """
    table = []
    for name in models:
        accuracies = [row["test_accuracy"][name] for row in rows]
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        table.append(
            {
                "model": name,
                "macs": plan[name].macs,
                "macs_of_base": plan[name].macs / plan.models[0].macs,
                "num_params": plan[name].num_params,
                "best_accuracy": accuracies[best],
                "best_epoch": rows[best]["epoch"],
                "last_accuracy": accuracies[-1],
            }
        )
    return table


def result_table(results: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """`result_rows` as text."""
    header = ("model", "MACs", "of base", "parameters", "best accuracy", "at epoch", "last accuracy")
    rows = tuple(
        (
            str(row["model"]),
            si(row["macs"]),
            f"{100 * row['macs_of_base']:.0f} %",
            si(row["num_params"]),
            f"{100 * row['best_accuracy']:.2f} %",
            str(row["best_epoch"]),
            f"{100 * row['last_accuracy']:.2f} %",
        )
        for row in results
    )
    return Table(header, rows, title)
