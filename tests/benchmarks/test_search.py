"""The ways to choose that a search is compared with keep the budget, and find what they say."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import search
import search_latency
import search_workers
from detachnet.deploy.stopwatch import Stopwatch
from detachnet.selection.candidate import Candidate
from detachnet.selection.costs import counted
from detachnet.selection.worth import Judge, Worth
from detachnet.training.recipe import load_recipe
from tests.searched import images, space_of_tiny, trained


def test_routes_are_spread_evenly() -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    whole = cost(Candidate()) or 0.0
    assert search.even_routes(space, cost, 0.6 * whole) == Candidate(("one:two",))
    assert search.even_routes(space, cost, 0.2 * whole) == Candidate(("stem:two",))
    assert search.even_routes(space, cost, 0.01 * whole) is None


def test_means_are_of_the_seeds_that_found_something() -> None:
    def row(seed: int, how: str, accuracy: float | None) -> dict[str, Any]:
        return {"network": "net", "seed": seed} | search.row(how, 0.5, 0.4 + seed / 10, 0.5, accuracy, 2, 60.0)

    first, second = search.means([row(0, "search", 0.5), row(1, "search", 0.7), row(0, "random", 0.25)])
    assert (first["how"], first["seeds"], first["test_accuracy"]) == ("search", 2, pytest.approx(0.6))
    assert first["test_deviation"] == pytest.approx(0.1 * 2**0.5)
    assert (first["macs_of_base"], first["tries"], first["minutes"]) == (pytest.approx(0.45), 2, 1)
    assert (second["how"], second["seeds"], second["test_deviation"]) == ("random", 1, None)
    assert search.means([row(0, "even routes", None)]) == []


@pytest.mark.slow
def test_every_way_is_compared_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def worth(self: Judge, candidate: Candidate) -> Worth:
        tried.append(candidate)
        lost = 0.1 * len(candidate.drop) + 0.05 * len(candidate.eighths)
        return Worth(0.9 - lost, lost)

    monkeypatch.setattr(Judge, "__call__", worth)
    sets = (images(40, 2), images(40, 1), images(40, 3))
    rows = search.compare(trained(), sets, (0.6,), 2, 0, tmp_path)
    assert [row["how"] for row in rows] == ["base", "search", "evolved", "random", "even routes", "even widths"]
    for row in rows[1:]:
        assert row["macs_of_base"] <= 0.6
        assert 0 <= row["test_accuracy"] <= 1
    _, found, evolved, at_random, *_ = rows
    assert 0 < at_random["tries"] <= found["tries"] < evolved["tries"] <= found["tries"] + 2
    assert at_random["held_out_accuracy"] <= found["held_out_accuracy"] <= evolved["held_out_accuracy"]
    before = len(tried)
    assert search.compare(trained(), sets, (0.6,), 2, 0, tmp_path) == rows
    assert len(tried) - before == 4  # of those that are reported, once more


def test_networks_are_recipes() -> None:
    for name, changes in search.NETWORKS.values():
        recipe = load_recipe(name, changes)
        assert recipe.train.sample == 1
        assert recipe.data.holdout == 2000  # type: ignore[union-attr]
        load_recipe(name, [*changes, *search.QUICK])


@pytest.mark.slow
def test_workers_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By threads here: processes are tried elsewhere."""
    pools = {"one process": nullcontext, "2 threads": partial(ThreadPoolExecutor, 2)}
    monkeypatch.setattr(search_workers, "ways", lambda options: pools)
    rows, (one, two) = search_workers.compare(
        trained(), images(40, 2), images(40, 1), SimpleNamespace(workers=2, quick=False)
    )  # type: ignore[arg-type]
    assert [row["by"] for row in rows] == list(pools)
    assert one.found == two.found
    assert rows[0]["of_one"] == 1


@pytest.mark.slow
def test_what_is_promised_is_beside_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stopwatch that counts MACs, and so takes as long for the sum as for the whole."""

    def seconds(self: Stopwatch, module: nn.Module, value: Tensor) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(value.clone())
        return counter.get_total_flops() / 2

    monkeypatch.setattr(Stopwatch, "__call__", seconds)
    options: Any = SimpleNamespace(runtime="torch", threads=1, rounds=2)
    rows = search_latency.compare(trained(), (images(40, 2), images(40, 1)), (0.6,), options)
    assert [row["model"] for row in rows] == ["base", rows[1]["model"]]
    assert rows[0]["budget_ms"] is None
    for row in rows:
        assert row["promised_off"] == pytest.approx(0)
        assert row["measured_ms"] == pytest.approx(row["macs_of_base"] * rows[0]["measured_ms"])
    assert rows[1]["measured_ms"] <= rows[1]["budget_ms"] == pytest.approx(0.6 * rows[0]["measured_ms"])
    load_recipe("resnet20_cifar10", search_latency.CHANGES)
