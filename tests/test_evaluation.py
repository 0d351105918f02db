"""Family + split -> accuracy: numbers are tested with the trainings they belong to, here what else it does."""

import pytest
import torch

import detachnet
from detachnet.data.datasets import Split, describe_data, load_data
from detachnet.evaluation import evaluate
from detachnet.training.start import check_classes


@pytest.fixture
def images() -> Split:
    split = load_data("cifar10-mini")[1]
    return Split(split.images[:20], split.labels[:20], split.classes)


@pytest.fixture
def net(images: Split) -> detachnet.DetachableNet:
    """A family that trains on a frozen base-model."""
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(model, ["features.6", "features.23"]).train()
    net.facts = net.facts.updated(data=describe_data("cifar10-mini", (images, images)))
    net.base.eval()
    return net


def modes(net: detachnet.DetachableNet) -> dict[str, bool]:
    return {name: module.training for name, module in net.named_modules()}


@pytest.mark.slow
def test_every_submodule_keeps_its_mode(net: detachnet.DetachableNet, images: Split) -> None:
    before = modes(net)
    assert len(set(before.values())) == 2
    evaluate(net, images)
    assert modes(net) == before


@pytest.mark.slow
def test_every_submodule_keeps_its_mode_after_a_failure(net: detachnet.DetachableNet, images: Split) -> None:
    before = modes(net)
    labels = torch.full_like(images.labels, 99)
    with pytest.raises((IndexError, RuntimeError)):
        evaluate(net, Split(images.images, labels, images.classes))
    assert modes(net) == before


@pytest.mark.slow
def test_looking_for_the_classes_keeps_modes(net: detachnet.DetachableNet) -> None:
    before = modes(net)
    check_classes(net)
    assert modes(net) == before
