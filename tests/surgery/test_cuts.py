from typing import Any

import pytest
import torch

import detachnet
from tests import models


def names(model: torch.nn.Module, size: int = 8) -> list[str]:
    return [point.name for point in detachnet.find_cuts(model, (3, size, size))]


def test_every_node_of_a_chain_is_a_cut() -> None:
    assert names(models.Plain()) == ["conv1", "bn1", "relu", "pool", "conv2", "bn2", "mean"]


def test_a_branch_beside_a_skip_connection_is_none() -> None:
    assert names(models.Skip()) == ["stem", "add", "head"]


def test_a_cut_point_knows_its_sub_model() -> None:
    point = next(p for p in detachnet.find_cuts(models.Plain(), (3, 8, 8)) if p.name == "pool")
    assert point.shape == (4, 4, 4)
    assert str(point.stepdown) == "2×2 stride 2×2"
    stepdown, conv2, fc = 4 * 4 * (3 * 2 * 2) * 4, 4 * 4 * (4 * 9) * 8, 8 * 5
    assert point.macs == stepdown + conv2 + fc
    assert point.num_params == (3 * 2 * 2 * 4 + 4) + (4 * 9 * 8 + 8) + 2 * 8 + (8 * 5 + 5)


@pytest.mark.slow
def test_counts_agree_with_the_detached_model() -> None:
    model = detachnet.create_model("torchvision:resnet18")
    net = detachnet.make_detachable(model, ["layer1", "layer3.0"], (3, 64, 64), check="none")
    for row in net.plan.models:
        assert row.num_params == sum(p.numel() for p in net.detach(row.name).parameters())


def test_macs_fall_from_front_to_back_apart_from_the_stepdown() -> None:
    points = detachnet.find_cuts(detachnet.create_model("timm:mobilenetv3_small_050"), (3, 64, 64))
    tails = [point.macs - point.stepdown.macs for point in points]
    assert tails == sorted(tails, reverse=True)


def cut(model: torch.nn.Module, *cuts: str, size: tuple[int, ...] = (3, 8, 8)) -> detachnet.DetachableNet:
    return detachnet.make_detachable(model, list(cuts), size)


def test_unknown_cut_shows_the_nearest_names() -> None:
    with pytest.raises(detachnet.CutError, match="cannot cut Plain at 'conv3': no node has that name") as error:
        cut(models.Plain(), "conv3")
    assert "conv2" in error.value.candidates
    assert error.value.node == "conv3"


def test_a_module_of_which_only_the_layers_are_called_names_the_last_of_them() -> None:
    class Listed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3) for _ in range(5))
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(detachnet.CutError, match="only what is in it is called") as error:
        cut(Listed(), "blocks", size=(3, 16, 16))
    assert error.value.candidates == ("blocks.4", "blocks.3", "blocks.2")


def test_crossed_cut_names_the_crossing_node() -> None:
    with pytest.raises(detachnet.CutError, match=r"at 'branch': 'stem' also crosses it") as error:
        cut(models.Skip(), "branch")
    assert error.value.candidates == ("stem", "add")
    assert "in the model (Skip)" in str(error.value)


def test_where_there_is_no_cut_other_sub_models_are_named() -> None:
    class Crossed(models.Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super().forward(x)
            return logits + x.mean((1, 2, 3))[:, None]

    with pytest.raises(detachnet.CutError, match="it has no valid cuts; sub-models without inner layers"):
        cut(Crossed(torch.nn.Conv2d(8, 8, 1)), "b", size=(3, 8, 8))


def test_an_output_from_in_front_of_a_cut_is_no_skip_connection() -> None:
    class WithFeature(models.Around):
        def forward(self, x: torch.Tensor) -> Any:
            feature = self.a(x)
            return self.fc(self.b(self.mid(feature)).relu().mean((2, 3))), feature

    with pytest.raises(detachnet.CutError, match=r"at 'b': 'a' also crosses it \(one of the model's outputs\)"):
        cut(WithFeature(torch.nn.Conv2d(8, 8, 1)), "b", size=(3, 8, 8))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["conv2", "conv1"], "cuts go front to back, but 'conv2' comes after 'conv1'"),
        (["pool", "pool"], "'pool' and 'pool' are the same place"),
        (["fc"], "that is the output"),
        (["x"], "that is the image itself|no node has that name"),
        ([3], r"a cut is the name of a node, not 3\n  try .*; shares of MACs are cuts=\[0.7"),
        (True, "cuts=True: give a list of names, a dict, a number of sub-models"),
        ([True], "a cut is the name of a node, not True"),
    ],
)
def test_wrong_cuts(cuts: Any, message: str) -> None:
    with pytest.raises(detachnet.CutError, match=message):
        detachnet.make_detachable(models.Plain(), cuts, (3, 8, 8))


def test_wrong_order_shows_the_right_one() -> None:
    with pytest.raises(detachnet.CutError, match=r"try\s+cuts=\['conv1', 'conv2'\]"):
        cut(models.Plain(), "conv2", "conv1")


def test_a_string_is_no_list_of_cuts() -> None:
    with pytest.raises(detachnet.CutError, match=r"write cuts=\['pool'\]"):
        detachnet.make_detachable(models.Plain(), "pool", (3, 8, 8))


@pytest.mark.parametrize("name", ["base", "all", "two words", "train"])
def test_reserved_names(name: str) -> None:
    with pytest.raises(detachnet.CutError, match="a sub-model cannot be called"):
        detachnet.make_detachable(models.Plain(), {name: "pool"}, (3, 8, 8))


def test_own_names() -> None:
    net = detachnet.make_detachable(models.Plain(), {"medium": "conv1", "small": "pool"}, (3, 8, 8))
    assert net.names == ("base", "medium", "small")
    assert net(torch.zeros(1, 3, 8, 8), which="small").shape == (1, 5)


def test_a_cut_in_front_of_a_batch_norm_gets_a_hint() -> None:
    assert "sub0 is cut between 'conv2' and its batch norm" in str(cut(models.Plain(), "conv2").plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:vgg16", "torchvision:vgg16_bn"])
def test_the_design_brief_example(name: str) -> None:
    model = detachnet.create_model(name, num_classes=10)
    cuts = ["features.6", "features.20"]
    plan = detachnet.make_detachable(model, cuts, input_size=(3, 32, 32), check="none").plan
    features = [model.stepdown.feature for model in plan.models if model.stepdown]
    assert features == ([(128, 16, 16), (512, 4, 4)] if name.endswith("vgg16") else [(64, 16, 16), (256, 8, 8)])


@pytest.mark.slow
def test_the_papers_cuts() -> None:
    plan = detachnet.make_detachable(
        detachnet.create_model("detachnet:vgg16_cifar"), ["features.6", "features.23"], check="none"
    ).plan
    assert [str(model.stepdown) for model in plan.models[1:]] == ["2×2 stride 2×2", "8×8 stride 8×8"]
    assert [model.stepdown.feature for model in plan.models[1:] if model.stepdown] == [(64, 16, 16), (256, 4, 4)]
    assert round(plan.models[0].macs / 1e6) == 313


def test_traced_control_flow_names_module_line_and_fix() -> None:
    with pytest.raises(
        detachnet.TraceError, match=r"'block.1' \(Chooser\) needs values that are not there"
    ) as error:
        detachnet.find_cuts(models.ControlFlow(), (3, 8, 8))
    assert "if x.mean() > 0:" in str(error.value)
    assert "models.py" in str(error.value)


def test_wrong_channel_count() -> None:
    with pytest.raises(detachnet.TraceError, match="does not run on 1×8×8 images: it fails at 'conv1'"):
        cut(models.Plain(), "pool", size=(1, 8, 8))


def test_unknown_input_size() -> None:
    with pytest.raises(detachnet.TraceError, match="the image size of Plain is not known"):
        detachnet.find_cuts(models.Plain())


@pytest.mark.parametrize("size", [(), (3, 0, 8), (3, 8.0, 8)])
def test_impossible_input_size(size: tuple[int, ...]) -> None:
    with pytest.raises(detachnet.TraceError, match="input_size is the shape of one image"):
        detachnet.find_cuts(models.Plain(), size)


@pytest.mark.slow
def test_declared_input_sizes() -> None:
    for name, size in (
        ("torchvision:inception_v3", 299),
        ("timm:efficientnet_b1", 240),
        ("torchvision:resnet18", 224),
    ):
        kwargs = {"init_weights": False} if "inception" in name else {}
        points = detachnet.find_cuts(detachnet.create_model(name, **kwargs))
        assert points[0].stepdown.image == (3, size, size)
