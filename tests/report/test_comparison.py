import json
import statistics
from pathlib import Path

import pytest
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet.report.comparison import compare, figure, table
from detachnet.training.recipe import load_recipe
from detachnet.training.runs import RunFolder

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
ACCURACY = {"base": 0.70, "sub0": 0.65, "sub1": 0.50}


def make_run(path: Path, accuracies: dict[str, float], *overrides: str) -> Path:
    """The folder of a finished run with given results."""
    folder = RunFolder(path)
    models = json.dumps(list(accuracies) if len(accuracies) < 3 else [])
    with folder.started(load_recipe(QUICKSTART, ["family.models={}", f"train.models={models}", *overrides])):
        pass
    rows = [
        {
            "model": model,
            "macs": 1_000_000,
            "macs_of_base": 1.0,
            "num_params": 2000,
            "best_accuracy": accuracy + 0.01,
            "best_epoch": 3,
            "last_accuracy": accuracy,
        }
        for model, accuracy in accuracies.items()
    ]
    folder.results.write_text(json.dumps(rows))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    runs = [
        make_run(tmp_path / f"family-{s}", {n: a + s / 100 for n, a in ACCURACY.items()}, f"train.seed={s}")
        for s in range(3)
    ]
    runs += [make_run(tmp_path / f"base-{s}", {"base": 0.72}, f"train.seed={s}") for s in range(2)]
    runs.append(make_run(tmp_path / "sub1_stem", {"sub1": 0.60}, "family.stepdown=stem"))
    runs.append(make_run(tmp_path / "sub1", {"sub1": 0.49}))
    return runs


def test_seeds_are_averaged_and_differences_taken(runs: list[Path]) -> None:
    entries = compare(runs)
    assert [(e.run, e.model, len(e.last)) for e in entries] == [
        ("family", "base", 3),
        ("family", "sub0", 3),
        ("family", "sub1", 3),
        ("base", "base", 2),
        ("sub1_stem", "sub1", 1),
        ("sub1", "sub1", 1),
    ]
    base, sub0, sub1, alone, *_ = entries
    assert base.last == pytest.approx((0.70, 0.71, 0.72))
    assert base.to_baseline == base.to_alone == pytest.approx(-0.01)
    assert sub0.to_baseline == pytest.approx(0.66 - 0.72)
    assert sub0.to_alone is None
    assert sub1.to_alone == pytest.approx(0.51 - 0.49)  # not the one with a stem
    assert (alone.to_baseline, alone.to_alone) == (None, None)
    spread = 100 * statistics.stdev([0.70, 0.71, 0.72])
    assert table(entries).rows[0][7] == f"71.00 ± {spread:.2f} %"
    assert table(entries).rows[4][6:] == ("61.00 %", "60.00 %", "-12.00", "")


@pytest.mark.parametrize(
    "other",
    ["train.epochs=7", "data.num_train=100", "model.kwargs.width=0.5", "optimizer.lr=0.2", "train.batch_size=32"],
)
def test_training_alone_means_the_same_budget_and_network(tmp_path: Path, other: str) -> None:
    family = make_run(tmp_path / "family", ACCURACY)
    alone = make_run(tmp_path / "alone", {"base": 0.7}, other)
    assert compare([family, alone])[0].to_baseline is None


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    names = [str(run) for run in runs]
    out = CliRunner().invoke(app, ["compare", *names, "--figure", str(tmp_path / "figure.svg")])
    assert out.exit_code == 0, out.output
    assert "71.00 ± 1.00 %" in out.output
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    rows = json.loads(CliRunner().invoke(app, ["compare", *names, "--json"]).stdout)
    assert rows[0]["last"] == pytest.approx([0.70, 0.71, 0.72])
    markdown = CliRunner().invoke(app, ["compare", *names, "--markdown"]).output
    assert markdown.startswith("| run | model |")
    assert len(markdown.splitlines()) == 8


def test_no_finished_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(detachnet.CheckpointError, match=r"holds no finished run[\s\S]*--resume"):
        compare([tmp_path])
    with pytest.raises(detachnet.CheckpointError, match="give the run's folder"):
        compare([tmp_path / "last.safetensors"])
    result = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert result.exit_code == 2


def test_a_figure_that_cannot_be_written(runs: list[Path], tmp_path: Path) -> None:
    for name in ("figure.nonsense", "no/folder.png"):
        with pytest.raises(detachnet.CheckpointError, match="cannot write the figure"):
            figure(compare(runs), tmp_path / name)


def test_runs_that_start_from_something_are_not_alone(tmp_path: Path) -> None:
    family = make_run(tmp_path / "family", ACCURACY)
    options = ("train.init=runs/base-0", "train.freeze_base=true")
    frozen = [make_run(tmp_path / f"frozen-{s}", {"sub0": 0.9}, *options, f"train.seed={s}") for s in range(2)]
    entries = compare([family, *frozen])
    assert entries[1].to_alone is None
    assert len(entries[-1].last) == 2


def test_seeds_that_start_from_their_own_base_model_are_one_experiment(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"warm-{s}", ACCURACY, f"train.init=runs/base-{s}", f"train.seed={s}") for s in (0, 1)
    ]
    assert [len(entry.last) for entry in compare(runs)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("starts", "together"),
    [
        (("runs/width25/base-{}", "runs/width25/base-{}"), True),
        (("runs/base-0", "runs/base-0"), True),
        (("runs/seed{}/epoch10.pth", "runs/seed{}/epoch10.pth"), True),
        (("runs/width25/base", "runs/width100/base"), False),
        (("epoch10.pth", "epoch50.pth"), False),
        (("resnet18-{}.pth", "resnet50-{}.pth"), False),
        (("runs/base-2", "runs/base-3"), False),
    ],
    ids=str,
)
def test_seeds_start_from_what_differs_in_the_seed_alone(
    tmp_path: Path, starts: tuple[str, str], together: bool
) -> None:
    runs = [
        make_run(tmp_path / f"warm-{s}", ACCURACY, f"train.init='{start.format(s)}'", f"train.seed={s}")
        for s, start in enumerate(starts)
    ]
    assert len(compare(runs)) == (3 if together else 6)


@pytest.mark.parametrize("file", ["", "/last.safetensors", "/best.safetensors"])
@pytest.mark.parametrize(("other", "together"), [([], True), (["model.kwargs.width=0.5"], False)])
def test_what_seeds_start_from_is_compared_by_its_recipe(
    tmp_path: Path, file: str, other: list[str], together: bool
) -> None:
    runs = []
    for s, changes in enumerate(([], other)):
        start = make_run(tmp_path / f"base-{s + 7}", {"base": 0.7}, f"train.seed={s + 7}", *changes)
        init = f"train.init='{start}{file}'"
        runs.append(make_run(tmp_path / f"warm-{s}", ACCURACY, init, f"train.seed={s}"))
    assert len(compare(runs)) == (3 if together else 6)


def test_files_beside_a_run_are_not_its_own(tmp_path: Path) -> None:
    make_run(tmp_path, {"base": 0.7})
    runs = [
        make_run(tmp_path / f"warm-{s}", ACCURACY, f"train.init='{tmp_path}/epoch{s + 7}.pth'", f"train.seed={s}")
        for s in range(2)
    ]
    assert len(compare(runs)) == 6


def test_other_recipes_keep_names_of_their_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"lr-{i}", ACCURACY, f"optimizer.lr=0.{i}") for i in (1, 2)]
    assert [entry.run for entry in compare(runs)] == ["lr"] * 3 + ["lr-2"] * 3


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a-0", ACCURACY)
    with pytest.raises(detachnet.CheckpointError, match="a-0 is given twice"):
        compare([run, run])
    with pytest.raises(detachnet.CheckpointError, match="a-1 is the second run of seed 0 of a"):
        compare([run, make_run(tmp_path / "a-1", ACCURACY)])
    held_out = make_run(tmp_path / "b-0", ACCURACY, "data.holdout=500")
    with pytest.raises(detachnet.CheckpointError, match="others on held-out training images"):
        compare([run, held_out])
