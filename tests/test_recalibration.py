import copy

import pytest
import torch
from torch import nn

import detachnet
from detachnet.recalibration import recalibrate

IMAGES = [torch.randn(8, 3, 32, 32) + i for i in range(3)]


@pytest.fixture
def net() -> detachnet.DetachableNet:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.1)
    return detachnet.make_detachable(model, ["features.6", "features.23"], (3, 32, 32), norm="shared")


def test_each_model_gets_the_statistics_of_its_own_features(net: detachnet.DetachableNet) -> None:
    before = copy.deepcopy(net.state_dict())
    fresh = recalibrate(net, IMAGES)
    assert fresh.plan.norm == "private"
    assert not fresh.training
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    for name in net.names:
        # The first norm of each model sees features that no other norm has changed.
        alone = net.detach(name).eval()
        norms = [m for m in alone.modules() if isinstance(m, nn.BatchNorm2d)]
        seen: list[torch.Tensor] = []
        norms[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].mean((0, 2, 3))))
        for images in IMAGES:
            alone(images)
        measured = next(m for m in fresh.detach(name).modules() if isinstance(m, nn.BatchNorm2d))
        torch.testing.assert_close(measured.running_mean, torch.stack(seen).mean(0))
        assert measured.momentum == 0.1


def test_statistics_over_one_batch_are_those_of_training_mode(net: detachnet.DetachableNet) -> None:
    fresh = recalibrate(net, IMAGES[:1])
    for name in net.names:
        trained = copy.deepcopy(net).train()(IMAGES[0], which=name)
        # Training mode divides by n, running statistics by n - 1: the deepest maps have 8·2·2 values.
        torch.testing.assert_close(fresh(IMAGES[0], which=name), trained, rtol=0.1, atol=0.1)


def test_dropout_stays_off() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout(0.9), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(1)
    )
    net = detachnet.make_detachable(model, ["0"], (3, 32, 32), norm="shared")
    one, other = (recalibrate(net, IMAGES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


def test_a_private_family_keeps_its_weights(net: detachnet.DetachableNet) -> None:
    private = net.with_private_norms()
    fresh = recalibrate(private, IMAGES)
    for (name, one), (_, other) in zip(private.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not torch.equal(private.base.features[1].running_mean, fresh.base.features[1].running_mean)
