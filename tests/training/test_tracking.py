"""Experiment trackers, through accelerate's interface to them."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType

import detachnet
from detachnet.training.loop import Listener

OVERRIDES = [
    *("model.kwargs.width=0.05", "data.num_train=100", "data.holdout=50", "train.batch_size=50", "train.epochs=3"),
    "schedule.warmup_epochs=1",
]


class Kept(tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker that keeps what it is told."""

    name = "tensorboard"
    requires_logging_directory = True
    runs: ClassVar[list["Kept"]] = []

    def __init__(self, run_name: str, logging_dir: Path) -> None:
        super().__init__()
        self.told: list[Any] = [run_name, Path(logging_dir)]
        self.runs.append(self)

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Kept]]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Kept)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    yield Kept.runs
    Kept.runs.clear()


def recipe(tracker: str) -> detachnet.Recipe:
    return detachnet.load_recipe("quickstart", [*OVERRIDES, f"train.log_with={tracker}"])


@pytest.mark.slow
def test_a_tracker_is_told_the_recipe_and_each_epoch(kept: list[Kept], tmp_path: Path) -> None:
    result = detachnet.train(recipe("tensorboard"), tmp_path / "run")
    (tracker,) = kept
    name, folder, config, *epochs, end = tracker.told
    assert (name, folder, end) == ("detachnet", tmp_path / "run", "finished")
    assert config["run"] == str(tmp_path / "run")
    assert config["train.epochs"] == 3
    assert config["family.cuts"] == '["features.6", "features.23"]'
    assert all(isinstance(value, str | int | float | bool) for value in config.values())
    rows = [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]
    assert [step for step, _ in epochs] == [1, 2, 3]
    for (_, told), row in zip(epochs, rows, strict=True):
        for kind in ("test_accuracy", "test_loss", "train_loss"):
            assert {name: told[f"{kind}/{name}"] for name in row[kind]} == row[kind]


@pytest.mark.slow
def test_a_resumed_run_tells_the_rest_and_a_failing_one_closes(
    kept: list[Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(Listener):
        def on_epoch(self, row: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    with pytest.raises(KeyboardInterrupt):
        detachnet.train(recipe("tensorboard"), tmp_path / "run", listener=Stopping())
    detachnet.train(recipe("tensorboard"), tmp_path / "run", resume=True)
    first, second = (tracker.told for tracker in kept)
    assert first[-1] == second[-1] == "finished"
    assert [step for step, _ in first[3:-1]] == [1]
    assert [step for step, _ in second[3:-1]] == [1, 2, 3]  # the checkpoint was of the step before
    assert second[3] == first[3]


@pytest.mark.slow
def test_a_tracker_changes_nothing(kept: list[Kept], tmp_path: Path) -> None:
    one = detachnet.train(recipe("tensorboard"), tmp_path / "one")
    other = detachnet.train(recipe(""), tmp_path / "other")
    assert len(kept) == 1
    assert one.folder.metrics.read_bytes() == other.folder.metrics.read_bytes()


@pytest.mark.usefixtures("kept")
def test_trackers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(detachnet.RecipeError, match=r"'tensorbord' is no experiment tracker[\s\S]*'tensorboard'"):
        detachnet.train(recipe("tensorbord"), tmp_path / "run")
    with pytest.raises(detachnet.RecipeError, match=r"'wandb', but that is not installed\n.*pip install wandb"):
        detachnet.train(recipe("wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_itself(tmp_path: Path) -> None:
    detachnet.train(recipe("tensorboard"), tmp_path / "run")
    assert list((tmp_path / "run" / "detachnet").glob("events.out.*"))
