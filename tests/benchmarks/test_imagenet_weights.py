"""Published weights are those of timm's network, and what the study searches has spans and filters."""

import pytest
import timm
import torch
from torch import nn

import detachnet
import imagenet_weights
from detachnet.data.datasets import load_data
from detachnet.selection.candidate import Candidate
from detachnet.selection.costs import counted
from detachnet.selection.space import CANDIDATE, Space

VEHICLES = {468, 511, 555, 569, 609, 656, 670, 675, 717, 751, 757, 817, 864, 867}
"""ImageNet's classes of cars and trucks, some of them."""


def lite() -> nn.Module:
    return timm.create_model("tf_efficientnet_lite0", num_classes=10, bn_momentum=0.1).eval()


def test_weights_are_taken_in_order_and_a_classifier_of_other_classes_stays() -> None:
    model = lite()
    own, theirs = model.state_dict(), timm.create_model("tf_efficientnet_lite0").state_dict()
    imagenet_weights.with_weights(model, {f"x{i}.{name}": value for i, (name, value) in enumerate(theirs.items())})
    now = model.state_dict()
    for name, value in theirs.items():
        assert torch.equal(now[name], own[name] if name.startswith("classifier.") else value), name
    with pytest.raises(detachnet.ModelError, match="other weights than those of EfficientNet-Lite0"):
        imagenet_weights.with_weights(model, dict(list(theirs.items())[:-1]))


@pytest.mark.slow
def test_spans_and_important_filters_of_the_network() -> None:
    net = detachnet.make_detachable(
        imagenet_weights.Enlarged(lite()), {}, (3, 32, 32), head="private", check="none"
    )
    space = Space(net)
    assert (len(space.groups), len(space.spans)) == (24, 9)
    cost = counted(space, "macs")
    candidate = Candidate((space.spans[3],)).with_widths({"net.blocks.4.1.conv_pw": 4})
    assert (cost(candidate) or 0) < (cost(Candidate()) or 0)
    family, x = space.family(candidate).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(family.detach(CANDIDATE)(x), family(x, which=CANDIDATE))


@pytest.mark.slow
def test_the_published_weights_know_cars_and_trucks() -> None:
    pytest.importorskip(imagenet_weights.PACKAGE)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    imagenet_weights.with_weights(model, imagenet_weights.weights())
    test = load_data("cifar10-mini")[1]
    some = test.images[(test.labels == 1) | (test.labels == 9)][:32]
    with torch.no_grad():
        answers = imagenet_weights.Enlarged(model)(some.float() / 255).topk(5).indices.tolist()
    assert sum(bool(VEHICLES & set(answer)) for answer in answers) > 16
