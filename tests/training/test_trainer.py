import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import detachnet
from detachnet.data.batches import Batches
from detachnet.data.datasets import Split, describe_data, select
from detachnet.evaluation import evaluate
from detachnet.surgery.enlarging import enlarged
from detachnet.surgery.layout import image_layout
from detachnet.training.loop import Listener
from detachnet.training.optimizer import make_loss, make_optimizer
from detachnet.training.preview import preview
from detachnet.training.processes import open_processes
from detachnet.training.recipe import load_recipe
from detachnet.training.runs import RunFolder
from detachnet.training.start import build_family, start_from
from detachnet.training.step import TrainingStep
from detachnet.training.trainer import train
from tests.disks import disk_of
from tests.helpers import nightly_but
from tests.runs import QUICKSTART, SMALL, KillAfter, Killed, assert_same_run, loop, recipe, tenth

pytestmark = pytest.mark.usefixtures("little_data")


STEPS = 8
"""Per epoch."""


SHARED = ("family.cuts=[]", 'family.models.late.drop=["features.16:features.22"]', "family.norm=shared")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(recipe(), folder).status == "finished"
    return folder


@pytest.mark.slow
def test_a_run_folder(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "metrics.jsonl",
        "recipe.toml",
        "results.json",
        "run.json",
        "table.md",
    ]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    results = json.loads((whole / "results.json").read_text())
    for row in results:
        accuracies = [r["test_accuracy"][row["model"]] for r in rows]
        assert row["best_accuracy"] == max(accuracies)
        assert accuracies[row["best_epoch"] - 1] == max(accuracies)
        assert row["last_accuracy"] == accuracies[-1]
    assert load_recipe(whole / "recipe.toml") == recipe()
    assert json.loads((whole / "run.json").read_text())["torch"] in torch.__version__


@pytest.mark.slow
def test_the_checkpoint_evaluates_to_the_same_numbers(whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    scores = evaluate(detachnet.load(whole / "last.safetensors"), tenth()[1])
    assert {name: score["accuracy"] for name, score in scores.items()} == rows[-1]["test_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", nightly_but([STEPS + 3], [1, 5, STEPS, STEPS + 3, 3 * STEPS]))
def test_resumed_equals_uninterrupted(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    with pytest.raises(Killed):
        train(recipe(), tmp_path / "run", listener=KillAfter(kill_at))
    assert train(recipe(), tmp_path / "run", resume=True).status == "finished"
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(["adamw"], ["momentum", "adamw"]))
def test_every_optimizers_state_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = (f"optimizer.name={name}", "train.epochs=1")
    train(recipe(*options), tmp_path / "whole")
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    with pytest.raises(Killed):
        train(recipe(*options), tmp_path / "run", listener=KillAfter(4))
    train(recipe(*options), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


SCRIPT = """
import sys
from detachnet.training import loop, trainer
from tests.runs import recipe, tenth
trainer.load_data = tenth
loop.SAVE_EVERY_S = 0
trainer.train(recipe(), sys.argv[1])
"""


@pytest.mark.slow
def test_kill_9(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "results.json").exists()
    (folder / ".last.safetensors.1.tmp").write_bytes(b"half a checkpoint")
    train(recipe(), folder, resume=True)
    assert_same_run(folder, whole)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(recipe(), tmp_path / "run", listener=KillAfter(2))
    assert not (tmp_path / "run" / "last.safetensors").exists()
    train(recipe(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_max_minutes(whole: Path, tmp_path: Path) -> None:
    result = train(recipe(), tmp_path / "run", max_minutes=0)
    assert (result.status, result.epochs, result.table) == ("time is up", 0, [])
    assert len(evaluate(detachnet.load(tmp_path / "run" / "last.safetensors"), tenth()[1])) == 3
    train(recipe(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


class Interrupt(Listener):
    def on_step(self, epoch: int, images: int, losses: Mapping[str, torch.Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_saves(whole: Path, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert train(recipe(), tmp_path / "run", listener=Interrupt()).status == "interrupted"
    assert signal.getsignal(signal.SIGINT) is handler
    train(recipe(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert train(recipe(), whole, resume=True).status == "finished"
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.nightly  # test_disks.py fails operations of every kind
def test_a_full_disk_leaves_a_run_that_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    with pytest.raises(Killed):
        train(recipe(), tmp_path / "run", listener=KillAfter(4))
    with disk_of(20_000), pytest.raises(detachnet.CheckpointError, match="the previous file is unchanged"):
        train(recipe(), tmp_path / "run", resume=True)
    train(recipe(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_folders_and_recipes_must_fit(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(detachnet.CheckpointError, match=r"there is a run in .* already"):
        train(recipe(), whole)
    with pytest.raises(detachnet.CheckpointError, match=r"there is no run in .* to resume"):
        train(recipe(), tmp_path / "nothing", resume=True)
    with pytest.raises(
        detachnet.RecipeError, match=r"started with another recipe[\s\S]*epochs = 3, now epochs = 4"
    ):
        train(recipe("train.epochs=4"), whole, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(detachnet.CheckpointError, match=r"cannot make the run folder|can be no folder of a run"):
        train(recipe(), tmp_path / "file" / "run")
    with pytest.raises(detachnet.CheckpointError, match=r"can be no folder of a run\n  what +it is no folder"):
        train(recipe(), tmp_path / "file")


@pytest.mark.slow
def test_a_run_resumes_whose_recipe_lacks_keys_that_came_later(whole: Path, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "run", max_minutes=0)
    text = (tmp_path / "run" / "recipe.toml").read_text()
    assert 'log_with = ""\n' in text
    (tmp_path / "run" / "recipe.toml").write_text(text.replace('log_with = ""\n', ""))
    train(recipe(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_family_that_is_not_being_trained_resumes_nothing(whole: Path, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "run", max_minutes=0)
    (tmp_path / "run" / "last.safetensors").write_bytes((whole / "best.safetensors").read_bytes())
    with pytest.raises(detachnet.CheckpointError, match=r"last\.safetensors does not say where its training is"):
        train(recipe(), tmp_path / "run", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("searched", [False, True])
def test_cudnn_searches_during_a_run_only(whole: Path, monkeypatch: pytest.MonkeyPatch, searched: bool) -> None:
    class Looking(Listener):
        def on_start(self, *_: object) -> None:
            assert torch.backends.cudnn.benchmark
            raise Killed

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", searched)
    with pytest.raises(Killed):
        train(recipe(), whole, resume=True, listener=Looking())
    assert torch.backends.cudnn.benchmark == searched


@pytest.mark.slow
def test_a_familys_images_have_the_size_of_the_data(tmp_path: Path) -> None:
    options = ("model.name=timm:resnet10t", "model.kwargs={num_classes=10}", 'family.cuts=["layer2"]')
    chosen = load_recipe(QUICKSTART, [*SMALL[1:], *options, "train.epochs=1"])
    train(chosen, tmp_path / "run", max_minutes=0)
    assert detachnet.load(tmp_path / "run" / "last.safetensors").plan.input_size == (3, 32, 32)


def test_a_failed_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(detachnet.CutError):
        train(recipe('family.cuts=["features.999"]'), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "models", nightly_but([["sub1"], ["base", "sub1"]], [["base"], ["sub1"], ["base", "sub1"]])
)
def test_any_set_of_models_is_trained_and_nothing_else(tmp_path: Path, models: list[str]) -> None:
    chosen = recipe(f"train.models={json.dumps(models)}", "train.epochs=1")
    before = build_family(chosen, (3, 32, 32))
    result = train(chosen, tmp_path / "run")
    assert [row["model"] for row in result.table] == models
    after = detachnet.load(tmp_path / "run" / "last.safetensors")
    assert after.facts.trained == tuple(models)
    assert after.facts.accuracy == {row["model"]: row["last_accuracy"] for row in result.table}
    trained = set(after.parameters_of(models))
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(one, other) == (name not in trained), name


@pytest.mark.slow
def test_the_seed_decides_everything_and_the_random_state_stays(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train(recipe("train.epochs=1"), tmp_path / "a").table
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert train(recipe("train.epochs=1"), tmp_path / "b").table == first
    assert train(recipe("train.epochs=1", "train.seed=1"), tmp_path / "c").table != first


@pytest.mark.slow
def test_multistep_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = record_rates(monkeypatch)
    options = ("schedule.name=multistep", "schedule.milestones=[2]", "optimizer.lr=0.01")
    train(recipe(*options), tmp_path / "run")
    warmup = [0.01 * step / STEPS for step in range(STEPS)]
    assert rates == pytest.approx([*warmup, *[0.01] * STEPS, *[0.001] * STEPS])


@pytest.mark.slow
def test_cosine_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = record_rates(monkeypatch)
    train(recipe("optimizer.lr=0.01"), tmp_path / "run")
    warmup = [0.01 * step / STEPS for step in range(STEPS)]
    cosine = [0.005 * (1 + math.cos(math.pi * step / (2 * STEPS))) for step in range(2 * STEPS)]
    assert rates == pytest.approx([*warmup, *cosine])


def record_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every step of the runs to come."""
    rates: list[float] = []
    update = TrainingStep.__call__

    def spy(self: TrainingStep, *batch: Any) -> torch.Tensor:
        rates.append(self.optimizer.param_groups[0]["lr"])
        return update(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", spy)
    return rates


@pytest.mark.slow
def test_evaluating_an_untrained_family() -> None:
    with pytest.raises(detachnet.CheckpointError, match="does not say what it was trained on"):
        evaluate(build_family(recipe(), (3, 32, 32)), tenth()[1])


@pytest.mark.slow
def test_held_out_training_images_stand_in_for_the_test_images(tmp_path: Path) -> None:
    chosen = recipe("data.num_train=300", "data.holdout=100", "train.epochs=1")
    result = train(chosen, tmp_path / "run")
    net = detachnet.load(result.folder.last)
    assert net.facts.data is not None
    assert (net.facts.data.num_test, net.facts.accuracy) == (0, {})
    train_split, _ = tenth()
    held_out = select((train_split, train_split), holdout=100)[1]
    scores = {name: score["accuracy"] for name, score in evaluate(net, held_out).items()}
    assert scores == {row["model"]: row["last_accuracy"] for row in result.table}


def test_more_images_than_there_are(tmp_path: Path) -> None:
    for given, said in (
        ({"num_train": 350, "holdout": 100}, r"for 350 \(data.num_train\) and 100 held out[\s\S]*of 300 at most"),
        ({"holdout": 900}, r"for a training and 900 held out \(data.holdout\)[\s\S]*data.holdout of 399 at most"),
    ):
        with pytest.raises(detachnet.DataError, match=f"400 training images are not enough {said}"):
            train(recipe(*(f"data.{key}={value}" for key, value in given.items())), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a base-model trained alone."""
    folder = tmp_path_factory.mktemp("base") / "run"
    return train(recipe('train.models=["base"]', "train.epochs=1"), folder).folder.last


@pytest.mark.slow
def test_all_models_start_from_a_trained_base_model(base_file: Path) -> None:
    before = detachnet.load(base_file)
    net = build_family(recipe(), (3, 32, 32))
    start_from(net, base_file)
    for name, tensor in before.base.state_dict().items():
        assert torch.equal(tensor, net.base.state_dict()[name]), name
    for name, tensor in net.norms.state_dict().items():
        assert torch.equal(tensor, net.base.state_dict()[name.partition(".")[2]]), name


@pytest.mark.slow
def test_a_start_that_does_not_fit(base_file: Path, tmp_path: Path) -> None:
    with pytest.raises(detachnet.CheckpointError, match="cannot be started from: it has no 'base"):
        train(recipe("model.kwargs.width=0.1", f"train.init={base_file}"), tmp_path / "run")
    with pytest.raises(detachnet.CheckpointError, match="there is no file"):
        train(recipe("train.init=nothing.safetensors"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("norm", nightly_but(["private"], ["private", "shared"]))
def test_a_frozen_base_model_stays_bit_for_bit(base_file: Path, tmp_path: Path, norm: str) -> None:
    chosen = recipe(f"train.init={base_file}", "train.freeze_base=true", f"family.norm={norm}", "train.epochs=2")
    before = build_family(chosen, (3, 32, 32))
    start_from(before, base_file)
    result = train(chosen, tmp_path / "run")
    after = detachnet.load(result.folder.last)
    changed = {n for n, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[n])}
    assert not {name for name in changed if name.startswith("base.")}
    assert {name.split(".")[0] for name in changed} == (
        {"stepdowns", "norms"} if norm == "private" else {"stepdowns"}
    )
    accuracies = [
        row["test_accuracy"]["base"] for row in map(json.loads, result.folder.metrics.read_text().splitlines())
    ]
    assert len(set(accuracies)) == 1


@pytest.mark.slow
def test_a_start_from_a_run_that_did_not_train_its_base_model(tmp_path: Path) -> None:
    run = train(recipe('train.models=["sub1"]', "train.epochs=1"), tmp_path / "sub1").folder
    with pytest.raises(detachnet.CheckpointError, match="its base-model was not trained"):
        train(recipe(f"train.init={run.path}"), tmp_path / "run")


@pytest.mark.slow
def test_another_precision_in_the_same_process(tmp_path: Path) -> None:
    for precision in ("bf16", "float32"):
        chosen = recipe(f"train.precision={precision}", "train.epochs=1", "data.num_train=100")
        assert train(chosen, tmp_path / precision).status == "finished"


@pytest.mark.slow
def test_nothing_left_to_train(base_file: Path, tmp_path: Path) -> None:
    options = ["train.freeze_base=true", f"train.init={base_file}"]
    for chosen, said in (
        (recipe(*options, 'train.models=["base"]'), "the base-model stays as it is, and no other is trained"),
        (recipe(*options, *SHARED), "all layers with weights are the base-model's"),
    ):
        for run in (preview, lambda chosen: train(chosen, tmp_path / "run")):
            with pytest.raises(detachnet.RecipeError, match=f"freeze_base leaves nothing to train: {said}"):
                run(chosen)
    assert not (tmp_path / "run").exists()


def test_images_of_other_channels_than_the_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = tuple(Split(split.images[:, :1], split.labels, split.classes) for split in tenth())
    monkeypatch.setattr("detachnet.training.trainer.load_data", lambda *_, **__: grey)
    for chosen in (recipe(), recipe("family.cuts=2")):
        with pytest.raises(
            detachnet.RecipeError, match="images of cifar10-mini have 1 channel, the model takes 3"
        ):
            preview(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [7, 20])
def test_outputs_that_are_not_those_of_the_classes(outputs: int, tmp_path: Path) -> None:
    chosen = recipe(f"model.kwargs.num_classes={outputs}")
    said = f"the model has {outputs} outputs, but cifar10-mini has 10 classes\n.*--set model.kwargs.num_classes=10"
    for run in (preview, lambda chosen: train(chosen, tmp_path / "run")):
        with pytest.raises(detachnet.RecipeError, match=said):
            run(chosen)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_stems_and_distillation_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    terms = ("loss.distillation=1", "loss.hint=0.5", "loss.weights={sub1=0.2}")
    chosen = recipe("family.stepdown=stem", *terms, "data.num_train=150")
    assert train(chosen, tmp_path / "whole").status == "finished"
    with pytest.raises(Killed):
        train(chosen, tmp_path / "killed", listener=KillAfter(4))
    train(chosen, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_whitening_is_of_the_first_batch_stays_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    small = ("data.name=cifar10-mini", "data.num_train=150", "train.batch_size=50", "model.kwargs.width=0.05")
    small += ('family.models={short={drop=["block1.act1:block1"]}}', "loss.weights={}")
    path = QUICKSTART.with_name("airbench_cifar10.toml")
    chosen = load_recipe(path, [*small, "train.epochs=2", "schedule.warmup_epochs=1"])
    assert train(chosen, tmp_path / "whole").status == "finished"
    with pytest.raises(Killed):
        train(chosen, tmp_path / "killed", listener=KillAfter(4))
    train(chosen, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")

    model = detachnet.create_model("detachnet:airbench", width=0.05)
    images, _ = next(iter(loop(chosen, tmp_path / "first").batches.epoch()))
    model.initialize_from(images)  # type: ignore[operator]
    filters = model.get_parameter("whiten.weight")
    saved = detachnet.load(tmp_path / "whole" / "last.safetensors")
    assert torch.equal(saved.base.get_parameter("whiten.weight"), filters)
    others = load_recipe(path, [*small, "train.seed=1", f"train.init={tmp_path / 'whole'}"])
    assert torch.equal(loop(others, tmp_path / "more").state.net.base.get_parameter("whiten.weight"), filters)


def test_separate_passes_need_no_hint_and_one_process() -> None:
    with pytest.raises(detachnet.RecipeError, match=r"needs train.strategy 'joint'"):
        recipe("train.strategy=separate", "loss.hint=1.0")


@pytest.fixture
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without kernels, whose making takes minutes; it refuses what is no single graph."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, mode: compiled(run, backend="eager", fullgraph=True))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_one_graph")
def test_a_compiled_training(whole: Path, tmp_path: Path) -> None:
    assert train(recipe("train.compile=true", "train.epochs=1"), tmp_path / "run").status == "finished"
    rows = [json.loads((path / "metrics.jsonl").read_text().splitlines()[0]) for path in (whole, tmp_path / "run")]
    for name, loss in rows[0]["train_loss"].items():
        assert rows[1]["train_loss"][name] == pytest.approx(loss, rel=1e-3)  # rounding grows from step to step


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    one = loop(recipe(), tmp_path)
    batches = one.batches.epoch()
    one.update(*next(batches))  # allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.update(*next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


class OnPaper:
    """A CUDA device as torch's fake tensors have it: devices and shapes, no values, no backward pass."""

    device, num_processes, process_index = torch.device("cuda", 0), 1, 0

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def backward(self, loss: torch.Tensor) -> None:
        assert loss.device == self.device
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)


def move_to_paper(module: torch.nn.Module) -> None:
    """To that device, channels-last."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
                moved = torch.empty_like(tensor, device=OnPaper.device, memory_format=layout)
                part._parameters[name] = torch.nn.Parameter(moved)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty_like(tensor, device=OnPaper.device)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    nightly_but(
        ["vgg16_cifar10_improved"],
        ["vgg16_cifar10", "vgg16_cifar10_improved", "resnet20_cifar10", "airbench_cifar10"],
    ),
)
def test_on_cuda_nothing_of_a_step_is_elsewhere_or_reads_a_value(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors refuse to mix devices, and to be read: what would wait for the device."""
    chosen = load_recipe(QUICKSTART.with_name(f"{name}.toml"), ["train.ema_decay=0.99", "train.batch_size=8"])
    splits = tenth()
    one = loop(chosen, tmp_path)
    net, averaged = one.state.net, one.state.averaged
    net.prepare(net.names)
    assert averaged
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_paper(net)
        move_to_paper(averaged.module)
        layout = image_layout(net, OnPaper.device)
        one.batches = Batches(
            splits[0], net.facts.data, 8, OnPaper.device, pad=4, flip=chosen.data.flip, shuffle=True, layout=layout
        )
        # A fused update is one kernel, which fake tensors have not.
        optimizer = make_optimizer(chosen, net, list(net.parameters()), fused=False)
        one.accelerator = OnPaper(net.parameters())
        one.step = TrainingStep(net, net.names, make_loss(chosen), optimizer, backward=one.accelerator.backward)
        one.state.sums = one.state.sums.to(OnPaper.device)
        one.state.finite = one.state.finite.to(OnPaper.device)
        for images, labels in islice(one.batches.epoch(), 2):
            assert images.is_contiguous(memory_format=torch.channels_last)
            losses = one.update(images, labels)
        assert {value.device for value in (*losses.values(), images, labels)} == {OnPaper.device}
        with pytest.raises(DataDependentOutputException):
            losses["base"].item()


@pytest.mark.slow
def test_models_that_flatten_with_view_are_evaluated() -> None:
    class Viewing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = (
                torch.nn.Conv2d(3, 4, 3),
                torch.nn.AvgPool2d(10),
                torch.nn.Linear(36, 10),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.fc(self.pool(self.conv(x)).view(-1, 36))
            return logits

    net = detachnet.make_detachable(Viewing(), ["conv"], (3, 32, 32))
    net.facts = net.facts.updated(data=describe_data("cifar10-mini", tenth()))
    assert evaluate(net, tenth()[1]).keys() == {"base", "sub0"}


@pytest.mark.slow
def test_what_saving_would_refuse_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*args: object) -> detachnet.DetachableNet:
        net = build_family(*args)  # type: ignore[arg-type]
        net.base.features[1].eps = 0.1  # type: ignore[index, union-attr]
        return net

    monkeypatch.setattr("detachnet.training.start.build_family", changed)
    with pytest.raises(detachnet.CheckpointError, match=r"was changed afterwards[\s\S]*eps of 'features.1'"):
        train(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


NARROW = ["family.models.half.width=0.5", 'family.models.best={width=0.75, filters="important"}']


@pytest.mark.slow
def test_a_recipe_with_widths(tmp_path: Path) -> None:
    """Trained, killed, resumed: the same to the bit; and a family to start others from."""
    options = recipe(*NARROW, "train.epochs=2", "data.num_train=150")
    assert train(options, tmp_path / "whole").status == "finished"
    with pytest.raises(Killed):
        train(options, tmp_path / "cut", listener=KillAfter(5))
    train(options, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    net = detachnet.load(tmp_path / "whole" / "last.safetensors")
    assert net.names == ("base", "sub0", "sub1", "half", "best")
    assert net.plan["half"].kept
    assert net.plan["best"].filters == "important"
    assert set(net.facts.accuracy) == set(net.names)
    table = (tmp_path / "whole" / "table.md").read_text()
    assert "half" in table
    images = torch.randn(2, *net.plan.input_size)
    assert torch.equal(net(images, which="half"), net.detach("half")(images))


FOUND = {"found": detachnet.SubModel(width={"features.0": 0.5, "features.3": 0.25}, filters="important")}
FOUND_TOO = 'family.models.found={width={"features.0"=0.5, "features.3"=0.25}, filters="important"}'


@pytest.fixture
def adopted(tmp_path: Path) -> Path:
    """A family to which a sub-model was added, each of its tensors another one."""
    net = enlarged(build_family(recipe(), (3, 32, 32)), FOUND)
    # Other filters than those that the weights say: they were chosen for two groups alike, say.
    kept = {name: units for name, units in net.plan["found"].kept.items() if name == "features.0"} | {
        "features.3": 2
    }
    net = enlarged(net, {"found": FOUND["found"].keeping(kept)}, ("sub0", "sub1"))
    draw = torch.Generator().manual_seed(0)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=draw))
    net.facts = net.facts.updated(trained=net.names)
    detachnet.save(net, tmp_path / "found.safetensors")
    return tmp_path / "found.safetensors"


@pytest.mark.slow
def test_all_models_go_on_from_where_they_are(adopted: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = detachnet.load(adopted)
    net = build_family(recipe(FOUND_TOO, f"train.init={adopted}"), (3, 32, 32))
    with caplog.at_level("INFO"):
        start_from(net, adopted)
    assert net.plan["found"].kept == there.plan["found"].kept
    assert net.state_dict().keys() == there.state_dict().keys()
    for name, value in there.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name
    assert "goes on with sub0, sub1, found as they are there" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"), [("layer1.0:layer1.1", "layer1.0:layer1"), ("layer1.1:layer2.0", "layer1:layer2.0")]
)
def test_a_sub_model_goes_on_whatever_its_places_are_called(tmp_path: Path, one: str, other: str) -> None:
    """The end of a stage is the end of its last block."""

    def family(span: str) -> detachnet.DetachableNet:
        model = detachnet.create_model("detachnet:resnet_cifar", depth=14)
        subs = {"short": detachnet.SubModel(drop=[span])}
        return detachnet.make_detachable(model, subs, (3, 32, 32), head="private", check="none")

    there = family(one)
    for value in there.state_dict().values():
        if value.is_floating_point():
            value.uniform_(1, 2)
    detachnet.save(there, tmp_path / "there.safetensors")
    net = family(other)
    start_from(net, tmp_path / "there.safetensors")
    assert net.route_of(there.plan["short"]) == net.route_of(net.plan["short"])
    for name, value in there.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


@pytest.mark.slow
def test_what_is_another_sub_model_starts_from_the_base_model(adopted: Path) -> None:
    there = detachnet.load(adopted)
    another = FOUND_TOO.replace("0.5", "0.75")
    net = build_family(recipe(another, 'family.cuts=["features.13"]', f"train.init={adopted}"), (3, 32, 32))
    start_from(net, adopted)
    assert net.plan["found"].kept != there.plan["found"].kept
    assert net.plan["sub0"].cut != there.plan["sub0"].cut
    for name, value in net.state_dict().items():
        if name.startswith(("norms.sub0.", "norms.found.")):
            theirs = there.state_dict()["base." + name.split(".", 2)[2]]
            assert torch.equal(value, net.own_tensor(name, theirs)), name
    # Of a run that trained some of its models, the others are not gone on with.
    there.facts = there.facts.updated(trained=("base", "found"))
    detachnet.save(there, adopted.with_name("some.safetensors"))
    net = build_family(recipe(FOUND_TOO, f"train.init={adopted}"), (3, 32, 32))
    start_from(net, adopted.with_name("some.safetensors"))
    for name, value in net.norms.state_dict().items():
        owner, _, path = name.partition(".")
        expected = there.norms.state_dict()[name] if owner == "found" else net.base.state_dict()[path]
        assert torch.equal(value, expected), name


@pytest.mark.slow
def test_important_filters_of_the_file_a_run_starts_from(whole: Path) -> None:
    options = recipe(*NARROW, f"train.init={whole}")
    net = build_family(options, (3, 32, 32))
    start_from(net, whole)
    first = detachnet.load(whole / "best.safetensors")
    again = detachnet.make_detachable(first.base, options.family.routes, (3, 32, 32), check="none")
    assert again.plan["best"].kept == net.plan["best"].kept
    assert build_family(recipe(*NARROW), (3, 32, 32)).plan["best"].kept != net.plan["best"].kept
    for name, value in again.state_dict().items():
        if name.startswith("base.") or name.split(".")[1] in ("half_", "best"):
            assert torch.equal(value, net.state_dict()[name]), name
    # A run that goes on keeps the filters it began with, whatever the weights it is built from.
    assert build_family(recipe(*NARROW), (3, 32, 32), net.plan).plan["best"].kept == net.plan["best"].kept


def test_an_accelerator_of_ones_own_stays_as_it_is(tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    with open_processes(recipe(), RunFolder(tmp_path)):
        pass
    theirs = Accelerator(mixed_precision="bf16", cpu=True)  # accelerate refuses another precision than there is
    with open_processes(recipe(), RunFolder(tmp_path)) as ours:
        assert ours.mixed_precision == "no"
    assert theirs.mixed_precision == "bf16"
    AcceleratorState._reset_state()
