"""Each benchmark measures what it says, on models small enough for a test."""

import argparse
import json
from datetime import date
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import common
import data_pipeline
import detached_inference
import image_files
import kernels
import switching
import training_step
import widths
from common import Target, Timing
from tests.helpers import nightly_but

CPU = torch.device("cpu")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return common.begin(common.arguments("q", fixed=True), ["--quick", "--json", str(tmp_path / "result.json")])


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts the graphs of torch.compile, which makes no kernels of them."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def test_alternatives_run_in_turn_and_then_the_other_way_round() -> None:
    runs: list[str] = []
    timing = common.time_in_turn({name: partial(runs.append, name) for name in "AB"}, CPU, 1.0, most=6)
    assert "".join(runs) == "AB" * (2 + 3) + "BA" * 3  # two of them warm up and find out how long a round takes
    assert timing.n == 6
    assert [len(seconds) for seconds in timing.seconds.values()] == [6, 6]


def test_ratios_are_those_of_the_rounds() -> None:
    timing = Timing({"A": [1.0, 20.0, 3.0], "B": [2.0, 40.0, 1.0]})
    assert timing.ratio("A", "B") == 0.5
    assert timing.median_ms("A") == 3000


def test_targets_and_tables() -> None:
    assert str(Target("a ÷ b", 0.7, 0.8)) == "met      a ÷ b: 0.700 (at most 0.800)"
    assert str(Target("a ÷ b", 9.0, 10.0, at_least=True)) == "not met  a ÷ b: 9.000 (at least 10.000)"
    lines = common.table(
        [{"model": "x", "base_ms": 1234.5, "mb": None}, {"model": "y", "base_ms": 123.45, "mb": 2}]
    )
    assert lines == ["model  base ms  mb", "x        1,234", "y        123.5   2"]


def test_a_report_says_all(options: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    common.report(options, [{"model": "x", "ms": 1.0, "n": 7}], [Target("x ÷ y", 2.0, 1.0)], extra=[1])
    out = capsys.readouterr().out
    assert "not met  x ÷ y: 2.000 (at most 1.000)" in out
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    result = json.loads(options.json.read_text())
    assert result["rows"] == [{"model": "x", "ms": 1.0, "n": 7}]
    assert result["targets"] == [{"what": "x ÷ y", "value": 2.0, "limit": 1.0, "at_least": False, "met": False}]
    assert result["hardware"]["device"].startswith("cpu")
    assert result["hardware"]["threads"] == "1"
    assert set(result["versions"]) == {"python", "detachnet", "torch", "torchvision", "timm"}
    assert (result["extra"], result["quick"]) == ([1], True)
    assert date.fromisoformat(result["date"]) <= date.today()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", nightly_but([False], [False, True]))
def test_training_step(
    compiled: bool,
    options: argparse.Namespace,
    compiler: CompileCounterWithBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_step, "added_memory", lambda case, way, _: {"base": 1_000_000}.get(way))
    case = training_step.VGG("tiny", batch=32, kwargs={"width": 0.03})
    options.compile = compiled
    row = training_step.measure(case, options, seconds=0, least=2)
    assert row["n"] == 2
    assert row["mac_ratio"] > 1
    assert ("joint_to_plain" in row) == compiled
    graphs = 3 + 3 if compiled else 0  # one a way, and one a model in `freed`
    assert compiler.frame_count == graphs  # so the joint step beside them is not compiled
    assert (row["base_mb"], row["joint_mb"]) == (1.0, None)
    of_separate, of_base = training_step.judge(case, row, CPU)
    assert (of_separate.limit, of_base.limit) == (0.80, row["mac_ratio"])


@pytest.mark.slow
def test_layouts(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    options.quick, seen = True, []
    run = training_step.Step.run

    def noted(step: training_step.Step, way: str) -> None:
        seen.append((way, step.images.is_contiguous(memory_format=torch.channels_last)))
        run(step, way)

    monkeypatch.setattr(training_step.Step, "run", noted)
    monkeypatch.setattr(
        training_step, "time_in_turn", lambda runs, *_: common.time_in_turn(runs, CPU, seconds=0, least=2)
    )
    row = training_step.measure_layouts(training_step.VGG("tiny", batch=4, kwargs={"width": 0.03}), options)
    assert row["n"] == 2
    assert row["last_to_first"] > 0
    assert set(seen) == {("joint", True), ("joint", False)}


@pytest.mark.slow
def test_what_a_route_shares_is_counted_once(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "added_memory", lambda *_: None)
    drop = training_step.ROUTES[0].drop
    case = training_step.VGG("tiny", drop=drop, batch=2, kwargs={"width": 0.03})
    options.compile = False
    row = training_step.measure(case, options, seconds=0, least=2)
    base, late = training_step.Step(case, CPU).net.plan.models
    assert row["sum_ratio"] == 1 + late.macs / base.macs
    assert row["mac_ratio"] == 1 + (late.macs - late.shared_macs) / base.macs < row["sum_ratio"]
    (target,) = training_step.judge(case, row, CPU)
    assert target.limit == 1.03 * row["mac_ratio"]


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "total_memory", lambda device: 10_000_000_000)
    row = {"model": "tiny", "norm": "private", "batch": 32, "base_mb": 1_000.0, "separate_mb": None}
    row |= {"freed_mb": 900.0, "joint_mb": 3_000.0}
    case = training_step.VGG("tiny", batch=128)
    assert training_step.left_out(case, [row], CPU) == "it would take 12 GB of the 10 GB there are"
    assert training_step.left_out(case, [row | {"joint_mb": 2_000.0}], CPU) == ""
    assert training_step.left_out(case, [row | {"norm": "shared"}], CPU) == ""
    unknown = dict.fromkeys(("base_mb", "separate_mb", "freed_mb", "joint_mb"))
    assert training_step.left_out(case, [row | unknown], CPU) == ""
    assert training_step.total_memory(CPU) > 1e8


@pytest.mark.slow
@pytest.mark.parametrize("compiled", nightly_but([False], [False, True]))
def test_every_way_is_the_same_step(compiled: bool, compiler: CompileCounterWithBackend) -> None:
    """Joint and separate steps give the same weights; that of the base-model leaves the step-downs as they are."""
    case = training_step.VGG("tiny", batch=4, kwargs={"width": 0.03})
    base, separate, freed, joint = (training_step.Step(case, CPU, compiled) for _ in training_step.WAYS)
    before = [parameter.clone() for parameter in base.net.stepdowns.parameters()]
    base.run("base")
    separate.run("separate")
    freed.run("freed")
    joint.run("joint")
    assert compiler.frame_count == (3 + 3 if compiled else 0)  # one a way, and one a model in `freed`
    for step in (freed, joint):
        for one, other in zip(separate.net.parameters(), step.net.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert all(map(torch.equal, before, base.net.stepdowns.parameters()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.slow
def test_training_memory_holds_gradients_and_momentum() -> None:
    case = training_step.VGG("small", batch=4, kwargs={"width": 0.25})
    weights = sum(p.nbytes for p in training_step.Step(case, CPU).net.base.parameters())
    assert training_step.resident_memory(case, "joint", threads=1) > 2 * weights


def test_cases() -> None:
    cases = list(training_step.cases())
    assert len({case.name for case in cases}) == len(cases) == 14
    smaller_first = [case.batch for case in cases if "route" not in case.name]
    assert smaller_first == [32, 128] * 6  # `left_out` goes by the smaller batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [detached_inference.vgg(0.03), detached_inference.resnet()], ids=lambda c: c.label
)
def test_detached_models_equal_those_by_hand(case: detached_inference.Case, options: argparse.Namespace) -> None:
    rows = detached_inference.measure(case, 1, options, seconds=0)  # compares the outputs
    assert [row["sub_model"] for row in rows] == ["sub0", "sub1"]
    assert all(row["n"] == 3 and row["to_by_hand"] > 0 for row in rows)


def test_unequal_outputs_are_not_timed(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = detached_inference.vgg(0.03)
    monkeypatch.setattr(detached_inference, "by_hand", lambda _, case, name: case.by_hand[name]().eval())
    with pytest.raises(AssertionError, match="not equal"):
        detached_inference.measure(case, 1, options, seconds=0)


@pytest.mark.slow
def test_switching(options: argparse.Namespace) -> None:
    net = switching.make("detachnet:vgg16_cifar", switching.VGG_CUTS, CPU, width=0.03)
    rows = switching.measure("tiny", net, options, seconds=0)
    assert [row["n"] for row in rows] == [3, 3]
    switch = switching.switch_us(net, repeats=2)
    assert switch["n"] == 2
    assert 0 < switch["us"] < 1000


@pytest.mark.nightly
def test_widths_on_disk() -> None:
    pytest.importorskip("onnxruntime")
    case = widths.Case("tiny", "detachnet:vgg16_cifar", (3, 32, 32), 1.5, {"width": 0.125})
    (row,) = rows = list(widths.storage(case))
    detached = [row[f"detached_{width}_mb"] for width in widths.WIDTHS]
    assert row["base_mb"] > detached[0] > detached[1] > detached[2] > 0
    assert 1 < row["file_ratio"] < 1 + sum(detached) / row["base_mb"]
    assert 1 < row["onnx_ratio"] < 1 + sum(detached) / row["base_mb"]
    assert [target.value for target in widths.limits(case, rows)] == [row["file_ratio"], row["onnx_ratio"]]


@pytest.mark.slow
def test_data_pipeline(options: argparse.Namespace) -> None:
    rows, ratio = data_pipeline.measure(options, 256, seconds=0)
    assert [row["pipeline"] for row in rows] == ["in memory", "DataLoader, 0 workers", "DataLoader, 2 workers"]
    assert rows[0]["in_memory_to_this"] == 1
    assert ratio == min(row["in_memory_to_this"] for row in rows[1:])


# timm's data set leaves it to Python to close files.
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_image_files_of_detachnet_and_of_timm(options: argparse.Namespace, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    size = image_files.write_photographs(tmp_path / "folder", 2 * image_files.BATCH)
    assert size == pytest.approx(88e3, rel=0.1)
    sources = {"folder": tmp_path / "folder"}
    sources["shards"] = image_files.write_shards(sources["folder"], tmp_path / "shards")
    rows = image_files.measure(sources, 0, options, seconds=0, least=1)
    assert [row["pipeline"] for row in rows] == ["folder", "shards", "timm"]
    assert all(row["images_per_s"] == row["per_core"] > 0 for row in rows)
    assert rows[2]["to_timm"] == 1


@pytest.mark.slow
def test_operators_of_a_step_are_counted_without_views() -> None:
    case = training_step.VGG("tiny", kwargs={"width": 0.05}, batch=2)
    row = kernels.measure(case, compiled=False)
    assert row["base_operators"] < row["joint_operators"] < row["separate_operators"]
    with kernels.Operators() as operators:
        x = torch.ones(2, 3)
        (x.view(3, 2).t() + x).sum()
    assert operators.count == 3  # ones, add, sum
