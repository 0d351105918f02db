import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detachnet_cli import predict as command
from detachnet_cli.app import app
from PIL import Image
from typer.testing import CliRunner

import detachnet
from detachnet.data.images import read_image, to_tensor
from detachnet.deploy.profile import profile, write_profile
from detachnet.evaluation import predict
from detachnet.facts import DataInfo

CLASSES = ("red", "green", "blue")
INFO = DataInfo(name="toy", classes=CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3, num_test=3)


class Brightest(torch.nn.Module):
    """Says which channel is the brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.pool = torch.nn.AvgPool2d(2)
        self.fc = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.conv(x)).mean((2, 3)))


def family() -> detachnet.DetachableNet:
    """A family whose file loads by itself, untrained."""
    model = detachnet.create_model("detachnet:vgg16_cifar", num_classes=3, width=0.05)
    net = detachnet.make_detachable(model, ["features.6"]).eval()
    net.facts = net.facts.updated(data=INFO, trained=("base", "sub0"))
    return net


@pytest.fixture
def net() -> detachnet.DetachableNet:
    """`base` answers by the brightest channel, `sub0` always `blue`."""
    net = detachnet.make_detachable(Brightest(), ["pool"], (3, 8, 8)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        torch.nn.init.dirac_(net.base.conv.weight)
        net.base.fc.weight.copy_(torch.eye(3))
        net.stepdowns.sub0.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    net.facts = net.facts.updated(data=INFO, trained=net.names)
    return net


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    detachnet.save(family(), "family.safetensors")
    for i, colour in enumerate(CLASSES):
        Image.new("RGB", (40 + i, 50), colour).save(f"{colour}.png")
    return tmp_path / "family.safetensors"


def run(*args: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["predict", *args], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_most_probable_class_comes_first(net: detachnet.DetachableNet) -> None:
    images = torch.stack([to_tensor(Image.new("RGB", (9, 9), c), INFO, (3, 8, 8)) for c in ("#0f0", "#f00")])
    answers = predict(net, images, "base")
    assert [answer.labels[0] for answer in answers] == ["green", "red"]
    assert [answer.labels[0] for answer in predict(net, images, "sub0")] == ["blue", "blue"]
    expected = net(images, which="base").softmax(1).amax(1)
    torch.testing.assert_close(torch.tensor([answer.probabilities[0] for answer in answers]), expected)
    assert sum(answers[0].probabilities) == pytest.approx(1)
    assert len(predict(net, images, "base", top=2)[0].labels) == 2


def test_outputs_without_names_are_refused(net: detachnet.DetachableNet) -> None:
    net.facts = net.facts.updated(data=INFO.model_copy(update={"classes": ("a", "b")}))
    with pytest.raises(detachnet.CheckpointError, match="base has 3 outputs, but 2 classes are named"):
        predict(net, torch.zeros(1, 3, 8, 8), "base")
    net.facts = net.facts.updated(data=None)
    with pytest.raises(
        detachnet.CheckpointError, match=r"does not say what it was trained on[\s\S]* try .*DataInfo"
    ):
        _ = net.facts.known_data


def test_the_first_of_the_names_that_was_trained_answers(net: detachnet.DetachableNet) -> None:
    net.facts = net.facts.updated(trained=("base", "sub0"))
    assert net.facts.model(("sub1", "sub0", "base")) == "sub0"


def test_only_trained_models_answer(net: detachnet.DetachableNet) -> None:
    net.facts = net.facts.updated(trained=("sub0",))
    assert net.facts.model(net.names) == "sub0"
    with pytest.raises(detachnet.CheckpointError, match=r"'base' was not trained\n  try      the models are sub0"):
        net.facts.model(net.names, "base")
    with pytest.raises(detachnet.CheckpointError, match=r"no model 'sub9'\n  try      the models are sub0"):
        net.facts.model(net.names, "sub9")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["base", "sub0"])
def test_files_and_folders(checkpoint: Path, model: str) -> None:
    Path("more/deep").mkdir(parents=True)
    Path("blue.png").rename("more/deep/blue.png")
    code, out, err = run(str(checkpoint), "red.png", "more", "green.png", "--model", model, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["model"], answer["skipped"]) == (model, [])
    assert [row["image"] for row in answer["images"]] == ["red.png", "more/deep/blue.png", "green.png"]
    net = detachnet.load(checkpoint)
    for row in answer["images"]:
        tensor = to_tensor(read_image(row["image"]), INFO, (3, 32, 32))
        shares = net(tensor[None], which=model).softmax(1)[0]
        found = {entry["name"]: entry["probability"] for entry in row["classes"]}
        torch.testing.assert_close(torch.tensor([found[name] for name in CLASSES]), shares)


@pytest.mark.slow
def test_a_table_for_people(checkpoint: Path) -> None:
    code, out, _ = run(str(checkpoint), "red.png", "green.png", "--top", "2")
    assert code == 0
    title, header, *rows = out.splitlines()
    assert title == f"base of {checkpoint}"
    assert header.split() == ["image", "answer", "probability", "then"]
    for row in rows:
        assert re.fullmatch(r"(red|green)\.png +\w+ +[\d.]+ % +\w+ [\d.]+ %", row)
    assert len(rows) == 2


@pytest.mark.slow
def test_a_long_name_is_not_cut(checkpoint: Path) -> None:
    name = "x" * 200 + ".png"
    Path("red.png").rename(name)
    assert name in run(str(checkpoint), name)[1]


@pytest.mark.slow
def test_many_pictures_run_in_batches(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(str(checkpoint), *[f"{c}.png" for c in CLASSES], "--json")[1]
    monkeypatch.setattr(command, "BATCH", 2)
    in_parts = run(str(checkpoint), *[f"{c}.png" for c in CLASSES], "--json")[1]
    for one, other in zip(json.loads(whole)["images"], json.loads(in_parts)["images"], strict=True):
        assert one["image"] == other["image"]
        assert one["classes"][0]["probability"] == pytest.approx(other["classes"][0]["probability"], abs=1e-5)


@pytest.mark.slow
def test_standard_input(checkpoint: Path) -> None:
    code, out, _ = run(str(checkpoint), "-", "--json", stdin=Path("red.png").read_bytes())
    expected = json.loads(run(str(checkpoint), "red.png", "--json")[1])["images"][0]
    assert code == 0
    assert json.loads(out)["images"] == [expected | {"image": "-"}]


@pytest.mark.slow
def test_what_cannot_be_read_is_named_and_skipped(checkpoint: Path) -> None:
    Path("half.png").write_bytes(Path("red.png").read_bytes()[:60])
    Image.fromarray(np.full((2, 2), 2, np.float32)).save("deep.tif")
    Path("empty").mkdir()
    code, out, err = run(str(checkpoint), "half.png", "gone.png", "deep.tif", "empty", "red.png", "--json")
    assert code == 1
    answer = json.loads(out)
    assert [row["image"] for row in answer["images"]] == ["red.png"]
    assert [row["image"] for row in answer["skipped"]] == ["half.png", "gone.png", "deep.tif", "empty"]
    assert re.search(r"^Skipped: half.png cannot be read: it is truncated or damaged\n  what", err, re.M)
    assert "Skipped: there is no file gone.png" in err
    assert "Skipped: deep.tif of mode 'F' has values from 2 to 2" in err
    assert "Skipped: there is no image in the folder empty" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone.png"], "Skipped: there is no file gone.png"),
        (["-"], "Skipped: standard input is empty"),
        (["red.png", "--model", "sub7"], "Error: the family has no model 'sub7'"),
        (["red.png", "--top", "0"], "Invalid value for '--top'"),
        ([], "Missing argument 'IMAGE...'"),
    ],
)
def test_mistakes_get_a_message_and_exit_code_2(checkpoint: Path, args: list[str], message: str) -> None:
    code, out, err = run(str(checkpoint), *args, stdin=b"")
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.slow
def test_a_budget_chooses_by_what_was_measured(checkpoint: Path) -> None:
    net = detachnet.load(checkpoint)
    net.facts = net.facts.updated(accuracy={"base": 0.9, "sub0": 0.8})
    detachnet.save(net, checkpoint)
    code, _, err = run(str(checkpoint), "red.png", "--budget-ms", "5")
    assert (code, f"try      detachnet profile {checkpoint}" in err) == (2, True)
    measured = profile(net, n=2, warmup=0, peak_memory=False)
    seconds = {"base": 0.008, "sub0": 0.003}
    of_four = tuple(row.model_copy(update={"batch": 4}) for row in measured.rows)
    write_profile(measured.model_copy(update={"rows": of_four}), checkpoint)
    code, _, err = run(str(checkpoint), "red.png", "--budget-ms", "5000")
    assert (code, "on 4 images at once" in err, f"profile {checkpoint} --batch 1" in err) == (2, True, True)
    rows = tuple(row.model_copy(update={"p90_s": seconds[row.model]}) for row in measured.rows)
    write_profile(measured.model_copy(update={"rows": rows}), checkpoint)
    for budget, model in (("8", "base"), ("7.9", "sub0")):
        assert json.loads(run(str(checkpoint), "red.png", "--budget-ms", budget, "--json")[1])["model"] == model
    code, _, err = run(str(checkpoint), "red.png", "--budget-ms", "2")
    assert (code, "Error: no model keeps latency_ms=2: sub0 comes nearest" in err) == (2, True)
    code, _, err = run(str(checkpoint), "red.png", "--budget-ms", "2", "--model", "sub0")
    assert (code, "not both" in err) == (2, True)


def test_half_precision(net: detachnet.DetachableNet) -> None:
    image = to_tensor(Image.new("RGB", (9, 9), "#0f0"), INFO, (3, 8, 8))[None]
    assert predict(net.to(torch.bfloat16), image, "base")[0].labels[0] == "green"


@pytest.mark.slow
def test_a_folder_that_is_no_run(checkpoint: Path) -> None:
    code, _, err = run(str(checkpoint.parent), "red.png")
    assert code == 2
    assert "it has no last.safetensors" in err
    assert f"nearest  '{checkpoint}'" in err


@pytest.mark.slow
def test_a_family_that_takes_no_pictures(tmp_path: Path, checkpoint: Path) -> None:
    net = family()
    net.facts = net.facts.updated(data=INFO.model_copy(update={"mean": (0.0,), "std": (1.0,)}))
    detachnet.save(net, "grey.safetensors")
    code, _, err = run("grey.safetensors", "red.png")
    assert code == 2
    assert "Error: the family takes in 3×32×32 images, which a picture cannot become" in err
