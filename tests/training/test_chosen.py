"""Recipes that leave their cuts to be chosen, and models of one's own."""

from pathlib import Path

import pytest
import torch
from torch import nn

import detachnet
from detachnet.surgery.routes import SubModel
from detachnet.training.recipe import Recipe, load_recipe
from detachnet.training.start import build_family, with_routes
from detachnet.training.trainer import train
from tests import models
from tests.helpers import nightly_but
from tests.runs import KillAfter, Killed, assert_same_run, recipe, tenth

SIZE = (3, 32, 32)
LITTLE = ("family.cuts=[]", "train.epochs=2")
ASKED = {
    'family.cuts="auto"': ("base", "sub0", "sub1"),
    "family.cuts=1": ("base", "sub0"),
    "family.cuts=[0.6]": ("base", "sub0"),
    "family.sub_models=2": ("base", "sub0", "sub1"),
    'family.sub_models="auto"': ("base", "sub0", "sub1"),
    "family.sub_models=[0.8, 0.5, 0.4]": ("base", "sub0", "sub1", "sub2"),
}
pytestmark = pytest.mark.usefixtures("little_data")


@pytest.mark.slow
@pytest.mark.parametrize("asked", nightly_but(['family.cuts="auto"', "family.sub_models=[0.8, 0.5, 0.4]"], ASKED))
def test_what_is_asked_for_is_chosen_once(asked: str) -> None:
    names = ASKED[asked]
    open_recipe = recipe("family.cuts=[]", asked, 'train.models=["sub0"]')
    assert open_recipe.family.names == names
    chosen = with_routes(open_recipe, SIZE)
    assert chosen.family.names == names
    assert chosen.family.asked == ""
    assert chosen.family.chosen == asked.removeprefix("family.").replace("=", " = ", 1)
    assert with_routes(chosen, SIZE) is chosen
    key, value = (
        ("cuts", open_recipe.family.cuts) if "cuts" in asked else ("sub_models", open_recipe.family.sub_models)
    )
    model = detachnet.create_model(chosen.model.name, **chosen.model.kwargs)
    python = detachnet.make_detachable(model, input_size=SIZE, check="none", **{key: value}).plan  # type: ignore[arg-type]
    ours = {n: [f":{sub}"] if isinstance(sub, str) else list(sub.drop) for n, sub in chosen.family.routes.items()}
    assert ours == {m.name: [str(span) for span in m.spans] for m in python.models[1:]}
    assert build_family(open_recipe, SIZE).plan == build_family(chosen, SIZE).plan


@pytest.mark.slow
def test_a_run_keeps_what_was_chosen_and_goes_on_with_it(tmp_path: Path) -> None:
    asked = recipe(*LITTLE, "family.sub_models=[0.7]")
    train(asked, tmp_path / "whole")
    with pytest.raises(Killed):
        train(asked, tmp_path / "run", listener=KillAfter(9))
    written = load_recipe(tmp_path / "run" / "recipe.toml")
    assert written.family.asked == ""
    assert list(written.family.models) == ["sub0"]
    assert isinstance(written.family.models["sub0"], SubModel)
    train(asked, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    train(written, tmp_path / "again")
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    with pytest.raises(detachnet.RecipeError, match="was started with another recipe"):
        train(recipe(*LITTLE, "family.sub_models=[0.6]"), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("family.sub_models=2",), "give either family.cuts, family.sub_models or family.widths"),
        (("family.cuts=[0.3, 0.7]",), r"shares of the MACs fall from front to back, unlike \[0.3, 0.7\]"),
        (("family.cuts=[1.5]",), "family.cuts"),
        (("family.cuts=0",), "family.cuts = 0: give names of nodes"),
        (("family.cuts=[]", "family.sub_models=0"), "family.sub_models = 0: give 'auto', a number"),
        (
            ("family.cuts=[]", "family.sub_models=2", 'family.models.sub1.drop=["a:b"]'),
            "sub1 is in family.sub_models",
        ),
        (('family.cuts="auto"', 'train.models=["sub2"]'), "sub2"),
    ],
)
def test_choices_that_are_none(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(detachnet.RecipeError, match=message):
        recipe(*overrides)


NET = """
import torch
from torch import nn
from blocks import block


class Net(nn.Module):
    def __init__(self, num_classes=10, chs=4):
        super().__init__()
        self.stem = block(3, chs)
        self.body = block(chs, 2 * chs)
        self.head = nn.Linear(2 * chs, num_classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def net(**kwargs):
    return Net(**kwargs)


def double(**kwargs):
    return Net(**kwargs).double()


def number():
    return 3
"""
BLOCKS = """
from torch import nn


def block(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(NET)
    (tmp_path / "code" / "blocks.py").write_text(BLOCKS)
    return tmp_path


def of_ones_own(folder: Path, *overrides: str) -> Recipe:
    text = recipe(
        "model.kwargs={chs=6}", 'model.name="mine.py:net"', 'family.cuts=["stem"]', "train.epochs=1", *overrides
    ).to_toml()
    (folder / "code" / "mine.toml").write_text(text)
    return load_recipe(folder / "code" / "mine.toml")


@pytest.mark.slow
def test_a_recipe_may_name_code_and_a_file_does_not_run_it(own: Path) -> None:
    result = train(of_ones_own(own), own / "run")
    with pytest.raises(detachnet.CheckpointError, match=r"a model of the user's own, Net[\s\S]*--model-file"):
        detachnet.load(result.folder.last)
    model = build_family(of_ones_own(own), SIZE).base
    assert detachnet.load(result.folder.last, model=model).names == ("base", "sub0")


@pytest.mark.slow
def test_a_model_in_float64_is_trained_in_it(own: Path) -> None:
    """Images, which are prepared in float32, are what its weights are."""
    result = train(of_ones_own(own, 'model.name="mine.py:double"'), own / "run")
    model = build_family(of_ones_own(own), SIZE).base
    net = detachnet.load(result.folder.last, model=model)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    _, test = tenth()
    found = {name: row["accuracy"] for name, row in detachnet.evaluate(net, test).items()}
    assert found == {row["model"]: row["last_accuracy"] for row in result.table}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:nothing", "has no function 'nothing'"),
        ("mine.py:number", r"number of mine.py cannot be called with \{'chs': 6\}"),
        ("other.py:net", r"there is no file other.py\n  what     looked for .*other.py and .*code.other.py"),
        ("bad.py:net", r"bad.py cannot be run\n  what     NameError"),
    ],
)
def test_code_that_makes_no_model(own: Path, name: str, message: str) -> None:
    (own / "code" / "bad.py").write_text("nonsense\n")
    with pytest.raises(detachnet.ModelError, match=message):
        build_family(of_ones_own(own, f'model.name="{name}"'), SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".tar"])
def test_a_run_starts_from_a_plain_state_dict(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    trained = detachnet.create_model("detachnet:vgg16_cifar", width=0.05, num_classes=7)
    state = {f"module.{name}": tensor for name, tensor in trained.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".tar" else state, path)
    from detachnet.training.start import start_from

    net = build_family(recipe(), SIZE)
    before = {name: tensor.clone() for name, tensor in net.base.state_dict().items()}
    with caplog.at_level("INFO"):
        new = start_from(net, path)
    layer = new[0].rpartition(".")[0]
    assert new == [f"{layer}.weight", f"{layer}.bias"]
    assert f"{layer!r} stays new, with 10 outputs; the file has 7 outputs" in caplog.text
    assert "'module.' in front of its names is left out" in caplog.text
    for name, tensor in net.base.state_dict().items():
        expected = before[name] if name in new else trained.state_dict()[name]
        assert torch.equal(tensor, expected), name
    with pytest.raises(detachnet.RecipeError, match=f"freeze_base would keep '{layer}.weight' untrained"):
        train(recipe(f"train.init={path}", "train.freeze_base=true"), tmp_path / "frozen")


@pytest.mark.slow
def test_published_weights_of_other_classes_are_not_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = detachnet.create_model("torchvision:resnet18").state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    options = (
        "model.name=torchvision:resnet18",
        "model.kwargs={pretrained=true, num_classes=10}",
        'family.cuts="auto"',
    )
    with pytest.raises(detachnet.RecipeError, match="freeze_base would keep 'fc' untrained, which the published"):
        train(recipe(*options, "train.freeze_base=true"), tmp_path / "run")


@pytest.mark.parametrize("given", ["the family", "its base-model alone", "a state dict"])
def test_what_layers_keep_besides_tensors_is_started_from_too(tmp_path: Path, given: str) -> None:
    from detachnet.training.start import start_from

    def family() -> detachnet.DetachableNet:
        model = models.Plain()
        model.fc = models.Keeping(8, 5)
        return detachnet.make_detachable(model, ["pool"], (3, 8, 8), head="private", check="none")

    trained, net, path = family(), family(), tmp_path / "start.safetensors"
    trained.base.fc.state = {"scale": 4}  # type: ignore[union-attr]
    trained.prepare(trained.names)  # which gives it to the copy
    trained.heads.sub0.fc.state = {"scale": 5}  # type: ignore[union-attr]
    if given == "a state dict":
        path = tmp_path / "start.pth"
        torch.save(trained.base.state_dict(), path)
    else:
        detachnet.save(trained, path, "base" if given == "its base-model alone" else None)
    assert start_from(net, path) == []
    assert net.base.fc.state == {"scale": 4}  # type: ignore[union-attr]
    own = net.heads.sub0.fc.state  # type: ignore[union-attr]
    assert own == {"scale": 5 if given == "the family" else 4}


@pytest.mark.slow
def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    from detachnet.training.start import start_from

    net = build_family(recipe(), SIZE)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(detachnet.CheckpointError, match="it has no weights of this model"):
        start_from(net, tmp_path / "linear.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(
        detachnet.CheckpointError, match=r"it is no state dict\n  what     it holds other[\s\S]*state_dict\(\)"
    ):
        start_from(net, tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(detachnet.CheckpointError, match="it holds no tensors by name"):
        start_from(net, tmp_path / "list.pth")
    other = detachnet.create_model("detachnet:vgg16_cifar", width=0.1)
    torch.save(other.state_dict(), tmp_path / "wider.pth")
    with pytest.raises(detachnet.CheckpointError, match=r"it has no 'base\.\S+' of that shape"):
        start_from(net, tmp_path / "wider.pth")
    with pytest.raises(detachnet.CheckpointError, match="there is no file"):
        start_from(net, tmp_path / "missing.pth")
