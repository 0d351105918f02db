"""A search from beginning to end: the same each time, from wherever it goes on, and what it refuses."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from detachnet_cli.app import app
from torch import nn
from typer.testing import CliRunner

import detachnet
from detachnet.data.datasets import Split
from detachnet.errors import BudgetError, CheckpointError, DataError, MeasurementError
from detachnet.progress import listening
from detachnet.report.fronts import figure
from detachnet.selection.costs import counted
from detachnet.selection.even import evenly
from detachnet.selection.front import Front
from detachnet.selection.images import run_images
from detachnet.selection.searching import JOURNAL
from detachnet.selection.space import Space
from detachnet.selection.worth import Judge, judged
from detachnet.training.recipe import load_recipe
from tests.runs import QUICKSTART
from tests.searched import DATA, SIZE, Tiny, images, trained

HELD_OUT, CALIBRATION = images(100, 2), images(100, 1)


def search(budgets: tuple[float, ...] = (0.6, 0.3), **options: Any) -> Front:
    return detachnet.search(trained(), HELD_OUT, list(budgets), calibration=CALIBRATION, **options)


def answer(front: Front) -> dict[str, Any]:
    """All of it that does not depend on the clock."""
    return front.to_json() | {"seconds": 0}


@pytest.mark.slow
def test_sub_models_within_budgets(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with listening(lambda *what: told.append(what)):
        front = search(folder=tmp_path)
    assert front.net.names == ("base", "short", *(name for name in front.models if name != "short"))
    base = front.net.plan["base"].macs
    for share in (0.6, 0.3):
        (found,) = (found for found in front.found if share * base in found.budgets)
        assert found.macs == front.net.plan[found.name].macs <= share * base
        assert found.accuracy == max(p.accuracy for p in front.points if p.macs <= share * base)
    assert "held-out accuracy" in str(front)
    assert "% of the way to the smallest budget" in {what for what, _, _ in told}
    figure(front, tmp_path / "search.svg")
    assert front.found[-1].name in (tmp_path / "search.svg").read_text(encoding="utf-8")
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    assert len(lines) == 1 + front.tries
    tried = [json.loads(line)["tried"] for line in lines[1:]]
    space = Space(trained())
    macs = counted(space, "macs")
    evens = [evenly(space, macs, share * base) for share in (0.6, 0.3)]
    assert {even.key for even in evens if even} <= set(tried)
    assert all(evens)

    # What was there before stays; what is new is part of it like anything else.
    before = trained()
    state = front.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    detachnet.save(front.net, tmp_path / "adopted.safetensors")
    loaded = detachnet.load(tmp_path / "adopted.safetensors", Tiny())
    some = torch.randn(3, *SIZE)
    for name in front.net.names:
        assert torch.equal(loaded(some, which=name), front.net(some, which=name))
        torch.testing.assert_close(loaded.detach(name)(some), loaded(some, which=name))


@pytest.mark.slow
@pytest.mark.parametrize("spelled", ["one:two", "one:two.relu_1"])
def test_what_is_a_sub_model_already_is_chosen_as_it_is(monkeypatch: pytest.MonkeyPatch, spelled: str) -> None:
    judge: Callable[..., Any] = Judge.__call__

    def preferring(self: Judge, candidate: Any) -> Any:
        short = candidate.drop == ("one:two",) and not candidate.eighths
        return judge(self, candidate)._replace(accuracy=0.5 + 0.4 * (candidate.is_base or short))

    monkeypatch.setattr(Judge, "__call__", preferring)
    net = detachnet.make_detachable(
        trained().base, {"short": detachnet.SubModel(drop=[spelled])}, SIZE, check="none"
    ).eval()
    net.facts = trained().facts
    front = detachnet.search(net, HELD_OUT, [0.55], calibration=CALIBRATION)
    assert front.net.names == net.names
    assert front.models.keys() == {"short"}
    assert all(torch.equal(value, front.net.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.slow
def test_the_same_again_and_from_wherever_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(search(folder=tmp_path / "one", evolve=4, seed=3))
    assert answer(search(folder=tmp_path / "two", evolve=4, seed=3)) == whole
    lines = (tmp_path / "one" / JOURNAL).read_text().splitlines(keepends=True)

    place = tmp_path / "three"
    place.mkdir()
    # Killed while it wrote the sixth line.
    (place / JOURNAL).write_text("".join(lines[:5]) + lines[5][:20])
    asked: list[str] = []
    judge = Judge.__call__

    def counted(self: Judge, candidate: Any) -> Any:
        asked.append(candidate.key)
        return judge(self, candidate)

    monkeypatch.setattr(Judge, "__call__", counted)
    assert answer(search(folder=place, evolve=4, seed=3)) == whole
    assert len(asked) == len(lines) - 5
    again = [json.loads(line)["tried"] for line in (place / JOURNAL).read_text().splitlines()[1:]]
    assert again == [json.loads(line)["tried"] for line in lines[1:]]

    # Other budgets use what was tried.
    asked.clear()
    search((0.6,), folder=place)
    assert not asked


@pytest.mark.slow
def test_images_that_are_normalized_otherwise_are_another_search(tmp_path: Path) -> None:
    net = trained()
    search(folder=tmp_path)
    net.facts = net.facts.updated(data=DATA.model_copy(update={"mean": (0.9, 0.9, 0.9)}))
    with pytest.raises(CheckpointError, match=r"is of another search: it differs in normalization"):
        detachnet.search(net, HELD_OUT, [0.6], calibration=CALIBRATION, folder=tmp_path)


@pytest.mark.slow
def test_an_executor_changes_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as executor:
        assert answer(search(executor=executor)) == answer(search())


@pytest.mark.slow
def test_another_network_does_not_go_on(tmp_path: Path) -> None:
    about = {"about": {"format_version": 1, "model": "Other"}}
    (tmp_path / JOURNAL).write_text(json.dumps(about) + "\n")
    with pytest.raises(CheckpointError, match=r"search.jsonl is of another search: it differs in model, weights"):
        search(folder=tmp_path)
    (tmp_path / JOURNAL).write_text('{"about": [1]}\n')
    with pytest.raises(CheckpointError, match=r"search.jsonl is of another search: it differs in format_version"):
        search(folder=tmp_path)
    (tmp_path / JOURNAL).write_text("[]\n")
    with pytest.raises(CheckpointError, match=r"search.jsonl is no file of a search"):
        search(folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ((), "search needs a budget"),
        ((-1.0,), "a budget is a positive number"),
        ((float("nan"),), "a budget is a positive number"),
        ((1e9,), "the base-model keeps it already"),
        ((0.6, 0.01), r"no sub-model of Tiny costs .* or less: the least is .*, 2.24 % of the base-model's"),
    ],
)
def test_a_budget_that_cannot_be(budgets: tuple[float, ...], said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        search(budgets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_candidates_of_another_precision(dtype: torch.dtype) -> None:
    expected = judged(trained(), "short", HELD_OUT, CALIBRATION)
    found = judged(trained().to(dtype), "short", HELD_OUT, CALIBRATION)
    assert found.loss == pytest.approx(expected.loss, rel=0.02)


def test_a_family_with_a_step_down_of_ones_own() -> None:
    def entry(image: tuple[int, ...], feature: tuple[int, ...]) -> nn.Module:
        return nn.Conv2d(image[0], feature[0], 1)

    net = detachnet.make_detachable(trained().base, ["one"], SIZE, stepdown=entry, check="none").eval()
    net.facts = trained().facts
    with pytest.raises(detachnet.CutError, match="with a step-down of your own cannot be enlarged"):
        detachnet.search(net, HELD_OUT, [0.6])


def test_an_unknown_kind_of_budget() -> None:
    with pytest.raises(BudgetError, match="by='watts': budgets are of macs, bytes"):
        search(by="watts")


def test_no_images_and_others() -> None:
    with pytest.raises(DataError, match="there are no held-out images to search with"):
        detachnet.search(trained(), HELD_OUT.part(0, 0), [0.5])
    others = Split(HELD_OUT.images, HELD_OUT.labels, HELD_OUT.classes[::-1])
    for data, calibration in ((others, None), (HELD_OUT, others)):
        with pytest.raises(DataError, match="the classes of the images are in another order"):
            detachnet.search(trained(), data, [0.5], calibration=calibration)
    unknown = Split(HELD_OUT.images, torch.full_like(HELD_OUT.labels, -100), HELD_OUT.classes)
    with pytest.raises(DataError, match="an image is of class -100, counted from 0"):
        detachnet.search(trained(), unknown, [0.5])


def test_a_family_of_unknown_data() -> None:
    net = trained()
    net.facts = detachnet.Facts()
    with pytest.raises(CheckpointError, match="does not say what it was trained on"):
        detachnet.search(net, HELD_OUT, [0.5])


@pytest.mark.slow
def test_an_untrained_network_is_at_chance() -> None:
    net = detachnet.make_detachable(Tiny().eval(), {}, SIZE, check="none")
    net.facts = trained().facts
    with pytest.raises(MeasurementError, match="the base-model answers at chance on the held-out images"):
        detachnet.search(net, HELD_OUT, [0.5])


@pytest.mark.slow
def test_candidates_that_are_all_at_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    judge: Callable[..., Any] = Judge.__call__

    def lost(self: Judge, candidate: Any) -> Any:
        worth = judge(self, candidate) if candidate.is_base else None
        return worth or judge(self, type(candidate)())._replace(accuracy=0.25)

    monkeypatch.setattr(Judge, "__call__", lost)
    with pytest.raises(MeasurementError, match=r"all 5 candidates answer at chance, the best with 25\.0 %"):
        search()


def test_images_that_a_run_was_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = images(40, 0)
    monkeypatch.setattr("detachnet.selection.images.load_data", lambda *_: (every, images(8, 9)))
    trained = [index for index in range(40) if index % 10]
    for change, held, rest in (
        ("num_train=30", range(30, 40), range(30)),
        ("num_train=12", [12 + i * 28 // 12 for i in range(12)], range(12)),
        ("holdout=4", [0, 10, 20, 30], trained),
    ):
        recipe = load_recipe(QUICKSTART, [f"data.{change}"])
        (tmp_path / "recipe.toml").write_text(recipe.to_toml())
        held_out, calibration = run_images(tmp_path, 12)
        assert torch.equal(held_out.images, every.images[list(held)])
        chosen = [rest[i * len(rest) // 12] for i in range(12)]
        assert torch.equal(calibration.images, every.images[chosen])
    (tmp_path / "recipe.toml").write_text(load_recipe(QUICKSTART).to_toml())
    with pytest.raises(DataError, match="was trained on all 40 training images: none is held out"):
        run_images(tmp_path, 12)
    with pytest.raises(CheckpointError, match="there is no run in"):
        run_images(tmp_path / "elsewhere", 12)


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text(load_recipe(QUICKSTART).to_toml())
    detachnet.save(trained(), tmp_path / "last.safetensors", own=True)
    monkeypatch.setattr("detachnet.selection.images.run_images", lambda *_: (HELD_OUT, CALIBRATION))
    monkeypatch.setattr("detachnet_cli.search.open_family", lambda *_: (tmp_path / "last.safetensors", trained()))
    monkeypatch.chdir(tmp_path)
    args = ["search", str(tmp_path), "--macs", "0.5"]
    done = CliRunner().invoke(app, [*args, "--adopt", "found.safetensors"])
    assert done.exit_code == 0, done.output
    assert "candidates tried on 100 held-out images" in done.output
    assert detachnet.load("found.safetensors", Tiny()).names[:2] == ("base", "short")
    recipe = load_recipe(tmp_path / "found.toml")
    assert recipe.train.init == "found.safetensors"
    (found,) = set(recipe.family.names) - set(load_recipe(QUICKSTART).family.names)
    assert json.loads((tmp_path / "search.json").read_text())["found"][0]["name"] == found
    assert json.loads((tmp_path / "search.json").read_text())["by"] == "macs"
    assert (tmp_path / "search.svg").exists()
    for wrong, said in (
        (["--adopt", "found.safetensors"], "found.safetensors exists already"),
        (["--adopt", "none/found.safetensors"], "there is no folder none"),
        (["--bytes", "0.5"], "search takes budgets of one kind"),
        (["--threads", "1"], "runtime and threads are for budgets of latency_ms"),
    ):
        refused = CliRunner().invoke(app, [*args, *wrong])
        assert refused.exit_code == 2
        assert said in refused.output
