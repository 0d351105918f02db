"""Layers that join the images of a batch, change values in place, or decide by the batch: exact, or refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detachnet
from tests.helpers import assert_joint_equals_separate


class Around(nn.Module):
    """conv1, then a function, then conv2 with a batch norm; another function in front of all."""

    def __init__(
        self, middle: Callable[[Tensor], Tensor], front: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)
        self.middle, self.front = middle, front

    def forward(self, x: Tensor) -> Tensor:
        if self.front is not None:
            x = self.front(x)
        return self.bn(self.conv2(self.middle(self.conv1(x)))).mean((2, 3))


class Quantize(nn.Module):
    """A user's leaf without state that looks at the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax() / 127
        return x + (x / scale).sin() * scale


def fill(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 4, 8, 8, dtype=x.dtype)
    out.copy_(x * 2)
    return out


def same(x: Tensor) -> Tensor:
    return x


MIDDLES = {
    "leaf": Quantize(),
    "std": lambda x: x / x.std(),
    "normalize": lambda x: F.normalize(x, dim=0),
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "cat": lambda x: torch.cat([x, x.flip(-1)], 0)[: x.shape[0]],
    "fill": fill,
}


@pytest.mark.parametrize("name", MIDDLES)
def test_what_joins_images_runs_model_by_model(name: str) -> None:
    net = detachnet.make_detachable(Around(MIDDLES[name]).double(), ["conv1"], (3, 8, 8))
    assert_joint_equals_separate(net, torch.randn(4, 3, 8, 8, dtype=torch.double))


@pytest.mark.parametrize("front", [lambda x: x.mul_(2), nn.ReLU(inplace=True)])
def test_step_downs_see_the_image_as_it_was(front: Callable[[Tensor], Tensor]) -> None:
    net = detachnet.make_detachable(Around(same, front).double(), ["conv1"], (3, 8, 8)).eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.double)
    joint = net(images.clone(), which="all")
    for name in net.names:
        torch.testing.assert_close(joint[name], net(images.clone(), which=name), rtol=1e-12, atol=1e-12)


def only_one(x: Tensor) -> Tensor:
    return x * 0 if x.shape[0] == 1 else x


def test_a_decision_by_one_image_is_refused() -> None:
    with pytest.raises(detachnet.TraceError, match="cannot trace Around"):
        detachnet.find_cuts(Around(only_one), (3, 8, 8))


def test_a_random_decision_is_refused() -> None:
    with pytest.raises(detachnet.TraceError, match="cannot trace Around"):
        detachnet.find_cuts(Around(lambda x: x if torch.rand(1) < 0.5 else -x), (3, 8, 8))


def test_random_values_are_drawn_at_every_call() -> None:
    net = detachnet.make_detachable(Around(lambda x: x + torch.randn(1, 4, 1, 1)), ["conv1"], (3, 8, 8)).eval()
    images = torch.randn(1, 3, 8, 8)
    assert not torch.equal(net(images), net(images))


def test_numbers_from_shapes_are_exact() -> None:
    model = Around(lambda x: x * float(x.shape[-1] / 3)).eval()
    net = detachnet.make_detachable(model, ["conv1"], (3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(images), model(images))


class OnlyInEvaluation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(x if self.training else x * 2).mean((2, 3))


def test_a_cut_that_exists_in_one_mode_only() -> None:
    with pytest.raises(detachnet.CutError, match="the model has 'mul' in evaluation mode only"):
        detachnet.make_detachable(OnlyInEvaluation(), ["mul"], (3, 8, 8))


class Pair(nn.Module):
    """Returns the logits and a number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv2(self.conv1(x)).mean((2, 3))
        return x, x.pow(2).mean()


def test_outputs_without_a_batch_axis() -> None:
    net = detachnet.make_detachable(Pair().double(), ["conv1"], (3, 8, 8))
    assert_joint_equals_separate(net, torch.randn(4, 3, 8, 8, dtype=torch.double))


@pytest.mark.slow
def test_auxiliary_heads_have_private_norms_too() -> None:
    model = detachnet.create_model("torchvision:googlenet", init_weights=False, aux_logits=True)
    net = detachnet.make_detachable(model, ["inception3a"], (3, 96, 96), check="none").train()
    before = {name: buffer.clone() for name, buffer in net.base.named_buffers()}
    net(torch.randn(2, 3, 96, 96), which="sub0")
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.base.named_buffers())


def test_images_of_another_size_are_refused() -> None:
    net = detachnet.make_detachable(Around(same), ["conv1"], (3, 8, 8)).eval()
    assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 5)
    for which in ("sub0", "all"):
        with pytest.raises(detachnet.StepDownError, match="made for images 3×8×8, not 3×16×16"):
            net(torch.zeros(1, 3, 16, 16), which=which)


@pytest.mark.parametrize("cuts", [None, 0.5, {"class": "conv1"}, {"training": "conv1"}, {"_modules": "conv1"}])
def test_impossible_cuts(cuts: object) -> None:
    with pytest.raises(detachnet.CutError):
        detachnet.make_detachable(Around(same), cuts, (3, 8, 8))  # type: ignore[arg-type]


def test_no_module_and_no_size() -> None:
    with pytest.raises(detachnet.TraceError, match=r"a model is a torch.nn.Module, not str"):
        detachnet.make_detachable("resnet18", 2)  # type: ignore[arg-type]
    with pytest.raises(detachnet.TraceError, match=r"input_size is the shape of one image, \(C, H, W\), not 16"):
        detachnet.make_detachable(Around(same), 1, 16)  # type: ignore[arg-type]


@pytest.mark.slow
def test_naming_no_model() -> None:
    net = detachnet.make_detachable(Around(same), ["conv1"], (3, 8, 8))
    with pytest.raises(detachnet.CutError, match="name each model once and in order"):
        net(torch.zeros(1, 3, 8, 8), which=[])


class Scaled(nn.Module):
    """A scale cast to the feature's type, as timm's vision transformers do it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return (x * self.scale.type_as(x)).mean((2, 3))


def test_a_scalar_cast_to_the_features_type_joins_nothing(caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(Scaled().double(), ["conv1"], (3, 8, 8))
    assert_joint_equals_separate(net, torch.randn(4, 3, 8, 8, dtype=torch.double))
    assert not caplog.records


class Flattened(nn.Module):
    """A batch norm over images and positions as one axis, as LeViT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        return self.bn(x.flatten(0, 1)).reshape(x.shape).mean(1)


class NormPair(nn.Module):
    """A leaf with a batch norm that returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bn(x)
        return x * 2, x.mean((2, 3))


class ReturnsPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.pair = NormPair()

    def forward(self, x: Tensor) -> Tensor:
        maps, means = self.pair(self.conv1(x))
        return maps.mean((2, 3)) + means


@pytest.mark.parametrize("norm", ["shared", "private"])
@pytest.mark.parametrize(("model", "leaves"), [(Flattened, ()), (ReturnsPair, (NormPair,))])
def test_coupled_layers_of_other_shapes_share_one_pass(
    caplog: pytest.LogCaptureFixture, model: type[nn.Module], leaves: tuple[type[nn.Module], ...], norm: str
) -> None:
    net = detachnet.make_detachable(
        model().double(),
        ["conv1"],
        (3, 8, 8),
        norm=norm,
        leaf_modules=leaves,  # type: ignore[arg-type]
    )
    assert_joint_equals_separate(net, torch.randn(4, 3, 8, 8, dtype=torch.double))
    assert not caplog.records


class BatchLast(nn.Module):
    """A batch norm of positions, in which the images are the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.conv(x).flatten(2).permute(2, 1, 0))
        return normed.permute(2, 1, 0).mean(2)


def test_a_batch_norm_whose_first_axis_is_not_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(BatchLast().double(), ["conv"], (3, 6, 6))
    assert_joint_equals_separate(net, torch.randn(4, 3, 6, 6, dtype=torch.double))
    assert "'bn' gives a value without the batch as its first axis" in caplog.text
