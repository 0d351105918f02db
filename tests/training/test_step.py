"""One step of a family's training: the same whichever way it is made."""

import copy
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

import detachnet
from detachnet.losses import MultiModelLoss
from detachnet.surgery.plan import Norm
from detachnet.training.step import Strategy, TrainingStep, without_gradient
from tests import models
from tests.helpers import nightly_but

Teacher = Literal["base", "larger"]

IMAGES, LABELS = torch.randn(12, 3, 32, 32, dtype=torch.double), torch.arange(12) % 10


def family(norm: Norm = "private") -> detachnet.DetachableNet:
    torch.manual_seed(0)
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    return (
        detachnet.make_detachable(model, ["features.6", "features.23"], (3, 32, 32), norm=norm, check="none")
        .double()
        .train()
    )


def sgd(net: detachnet.DetachableNet) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)


def gradients(
    loss: MultiModelLoss, norm: Norm = "private", strategy: Strategy = "joint", compiled: bool = False
) -> dict[str, Tensor]:
    """Losses, gradients and statistics of a step in float64."""
    net = family(norm)
    step = TrainingStep(net, net.names, loss, sgd(net), strategy=strategy, compiled=compiled)
    losses = step.add_gradients(IMAGES, LABELS)
    grads = {f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    buffers = {f"buffer {name}": buffer for name, buffer in net.named_buffers()}
    return dict(zip(net.names, losses, strict=True)) | grads | buffers


def assert_close(these: dict[str, Tensor], those: dict[str, Tensor]) -> None:
    assert these.keys() == those.keys()
    for name, one in these.items():
        assert torch.allclose(one.double(), those[name].double(), 1e-9, 1e-11), name


@pytest.mark.slow
def test_a_step_is_what_one_writes_by_hand() -> None:
    net = family()
    other, loss = copy.deepcopy(net), MultiModelLoss({"sub1": 0.3}, label_smoothing=0.1)
    step, optimizer = TrainingStep(net, net.names, loss, sgd(net)), sgd(other)
    for _ in range(2):
        losses = step(IMAGES, LABELS)
        optimizer.zero_grad()
        outputs = other(IMAGES, which="all")
        loss(outputs, LABELS).backward()
        optimizer.step()
        assert losses.tolist() == [float(one.detach()) for one in loss.per_model(outputs, LABELS).values()]
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_only_the_models_that_are_named_are_trained() -> None:
    net = family()
    before, trained = copy.deepcopy(net), net.parameters_of(["sub1"])
    assert TrainingStep(net, ["sub1"], MultiModelLoss(), sgd(net))(IMAGES, LABELS).shape == (1,)
    for (name, one), (_, other) in zip(before.named_parameters(), net.named_parameters(), strict=True):
        assert torch.equal(one, other) == (name not in trained), name


@pytest.mark.slow
def test_what_runs_and_what_propagates_may_be_given() -> None:
    net, seen = family(), []

    def forward(images: Tensor, **options: object) -> object:
        seen.append(options)
        return net(images, **options)

    def backward(loss: Tensor) -> None:
        seen.append(loss.detach())
        loss.backward()

    loss = MultiModelLoss({"sub0": 0.5})
    losses = TrainingStep(net, net.names, loss, sgd(net), forward=forward, backward=backward)(IMAGES, LABELS)
    assert seen == [{"which": net.names, "features": False}, losses[0] + 0.5 * losses[1] + losses[2]]


def test_two_models_have_a_hint() -> None:
    net, loss = family(), MultiModelLoss(hint=0.5)
    outputs, features = copy.deepcopy(net)(IMAGES, which=("base", "sub1"), features=True)
    expected = [float(one.detach()) for one in loss.per_model(outputs, LABELS, features).values()]
    step = TrainingStep(net, ["base", "sub1"], loss, sgd(net))
    assert step.add_gradients(IMAGES, LABELS).tolist() == pytest.approx(expected)
    assert expected[1] > float(MultiModelLoss()(outputs, LABELS).detach()) - expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["private", "shared"])
@pytest.mark.parametrize("teacher", ["base", "larger"])
def test_separate_passes_give_the_same_gradients(norm: Norm, teacher: str) -> None:
    loss = MultiModelLoss({"sub1": 0.3}, distillation=1.0, teacher=teacher)
    assert_close(gradients(loss, norm), gradients(loss, norm, "separate"))


def test_separate_passes_of_a_model_that_changes_its_images() -> None:
    subs = {"short": detachnet.SubModel(drop=["a:mid"]), "narrow": detachnet.SubModel(width=0.5)}
    net = detachnet.make_detachable(models.ChangesImages(torch.nn.Conv2d(8, 8, 1)), subs, (3, 8, 8), check="none")
    nets = [net.double().train(), copy.deepcopy(net)]
    images, labels = torch.randn(6, 3, 8, 8).double(), torch.arange(6) % 5
    strategies: list[Strategy] = ["joint", "separate"]
    steps = [
        TrainingStep(one, one.names, MultiModelLoss(distillation=1.0), sgd(one), strategy=strategy)
        for one, strategy in zip(nets, strategies, strict=True)
    ]
    losses = [step.add_gradients(images.clone(), labels) for step in steps]
    torch.testing.assert_close(*losses)
    grads = [{name: p.grad for name, p in one.named_parameters()} for one in nets]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("teacher", ["base", "larger"])
@pytest.mark.parametrize("strategy", ["joint", "separate"])
def test_a_step_of_a_small_family_is_the_loss_of_its_outputs(strategy: Strategy, teacher: Teacher) -> None:
    """Losses, gradients, and statistics, which move once where two models are one network."""
    subs = {"late": detachnet.SubModel(drop=["conv2:bn2"]), "front": detachnet.SubModel(drop=[":pool"])}
    net = detachnet.make_detachable(models.Plain(), subs, (3, 8, 8), check="none").double().train()
    other, images, labels = copy.deepcopy(net), torch.randn(6, 3, 8, 8).double(), torch.arange(6) % 5
    loss = MultiModelLoss({"late": 0.3}, distillation=0.7, temperature=2.0, teacher=teacher)
    step = TrainingStep(net, net.names, loss, sgd(net), strategy=strategy)
    losses = step.add_gradients(images, labels)
    expected = loss.per_model(other(images, which="all"), labels)
    loss.total(expected).backward()
    torch.testing.assert_close(losses, torch.stack([one.detach() for one in expected.values()]))
    for (name, one), (_, two) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
    torch.testing.assert_close(dict(net.named_buffers()), dict(other.named_buffers()))
    assert net.base.get_buffer("bn1.num_batches_tracked") == 1
    step(images, labels)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["joint", "separate"])
@pytest.mark.parametrize("norm", nightly_but(["private"], ["private", "shared"]))
def test_the_compiled_step_is_one_graph_and_the_same(
    norm: Norm, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kernels, whose making takes minutes; what is no single graph is refused."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, mode: compiled(run, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    loss = MultiModelLoss(distillation=1.0, hint=0.5 if strategy == "joint" else 0.0)
    assert_close(gradients(loss, norm, strategy), gradients(loss, norm, strategy, compiled=True))


def test_a_frozen_base_model_is_frozen_in_both_ways() -> None:
    found = []
    for strategy in get_args(Strategy):
        net = family()
        net.base.requires_grad_(False)
        step = TrainingStep(net, net.names, MultiModelLoss(distillation=1.0), sgd(net), strategy=strategy)
        losses = step.add_gradients(IMAGES, LABELS)
        found.append({"losses": losses} | {n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1])
    assert not [name for name in found[0] if name.startswith("base.")]


def test_no_model_learns_from_a_smaller_one_as_the_larger() -> None:
    sizes = {"small": detachnet.SubModel(width=0.25), "large": detachnet.SubModel(width=0.75)}
    model, larger = (
        detachnet.create_model("detachnet:vgg16_cifar", width=0.25),
        MultiModelLoss(distillation=1.0, teacher="larger"),
    )
    net = detachnet.make_detachable(model, sizes, check="none")
    with pytest.raises(detachnet.RecipeError, match="large would learn from small, which is smaller"):
        TrainingStep(net, net.names, larger, sgd(net))
    TrainingStep(net, ("base", "small"), larger, sgd(net))
    TrainingStep(net, net.names, MultiModelLoss(distillation=1.0), sgd(net))


class Auxiliary(torch.nn.Module):
    """A model with a head for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = torch.nn.Conv2d(3, 8, 3, 2), torch.nn.Conv2d(8, 8, 3, 2)
        self.norm, self.head, self.other = torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 10), torch.nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.norm(self.front(x)).relu()
        out = self.head(self.back(h).relu().mean((2, 3)))
        return (out, self.other(h.mean((2, 3)))) if self.training else out


def test_what_the_loss_gives_no_gradient() -> None:
    net = detachnet.make_detachable(Auxiliary(), ["front"], (3, 16, 16)).train()
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert without_gradient(net, net.names, MultiModelLoss()) == ["base.other.weight", "base.other.bias"]
    torch.testing.assert_close(net.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in net.parameters())
    net.base.other.requires_grad_(False)
    assert without_gradient(net, net.names, MultiModelLoss()) == []
