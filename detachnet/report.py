"""any result -> plain rows and text; nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detachnet.plan import DetachPlan, si

COLUMNS = ("model", "MACs", "of base", "parameters", "best accuracy", "at epoch", "last accuracy")


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


def result_cells(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """`result_rows` as text, in the order of `COLUMNS`."""
    return [
        (
            str(row["model"]),
            si(row["macs"]),
            f"{100 * row['macs_of_base']:.0f} %",
            si(row["num_params"]),
            f"{100 * row['best_accuracy']:.2f} %",
            str(row["best_epoch"]),
            f"{100 * row['last_accuracy']:.2f} %",
        )
        for row in table
    ]


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column stands on the left, the others on the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, rule, *cells])
