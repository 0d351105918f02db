"""Choosing what a narrower network keeps."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import detachnet
from detachnet.surgery.widths.choice import choose
from detachnet.surgery.widths.order import important
from detachnet.surgery.widths.slicing import slice_model
from tests import models
from tests.widths import find, narrowed, randomize


def resnet() -> nn.Module:
    return detachnet.create_model("torchvision:resnet18", num_classes=10)


def test_all_of_it_is_the_model() -> None:
    model = randomize(resnet()).eval()
    traced, channels = find(model, (3, 64, 64))
    kept = choose(channels, 1.0)
    assert kept.macs == sum(traced.eval.macs.values())
    assert kept.num_params == sum(p.numel() for p in model.parameters())
    narrow, images = slice_model(model, traced, kept), torch.randn(2, 3, 64, 64)
    assert torch.equal(narrow(images), model(images))
    assert narrow.state_dict().keys() == model.state_dict().keys()


CHANNELS = find(resnet(), (3, 64, 64))[1]


@pytest.mark.slow
@settings(max_examples=30)
@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_wider_costs_more_and_narrower_nests(one: float, other: float) -> None:
    small, large = (choose(CHANNELS, width) for width in sorted((one, other)))
    assert small.macs <= large.macs
    assert small.num_params <= large.num_params
    assert bool((small.mask <= large.mask).all())
    assert all(group.kept % 8 == 0 for group in small.groups if not group.reason)


def test_each_group_its_width() -> None:
    kept = choose(CHANNELS, {"layer1.0.conv1": 0.25, "layer4.0.conv2": 0.5})
    cut = {group.name: (group.kept, group.channels) for group in kept.groups if group.kept < group.channels}
    assert cut == {"layer1.0.conv1": (16, 64), "layer4.0.conv2": (256, 512)}


def test_a_path_means_all_filters_made_below_it() -> None:
    kept = choose(CHANNELS, {"layer3": 0.5, "layer4.1.conv1": 0.25})
    cut = {group.name: group.kept / group.channels for group in kept.groups if group.kept < group.channels}
    assert cut == {
        "layer3.0.conv1": 0.5,
        "layer3.0.conv2": 0.5,
        "layer3.1.conv1": 0.5,
        "layer4.1.conv1": 0.25,
    }


def test_an_order() -> None:
    """The last filters first; what is not in the order comes behind it."""
    result = narrowed(resnet(), (3, 64, 64), 0.25, order={"layer1.0.conv1": range(63, 55, -1)})
    layer = result.kept.channels.layers["base.layer1.0.conv1"]
    assert layer.makes is not None
    assert result.kept.indices(layer.makes).tolist() == [*range(8), *range(56, 64)]
    assert result.error < 1e-9


@pytest.mark.slow
def test_the_important_ones() -> None:
    """Without gain a filter is the last, with large readers the first; one order nests."""
    model = resnet()
    with torch.no_grad():
        model.get_submodule("layer1.0.bn1").weight[:8] = 0.0
        model.get_submodule("layer1.0.conv2").weight[:, 40:48] *= 100
    channels = find(model, (3, 64, 64))[1]
    order = important(model, channels)
    assert {*order["layer1.0.conv1"][:8]} == {*range(40, 48)}
    assert {*order["layer1.0.conv1"][-8:]} == {*range(8)}
    assert order.keys() == {g.name for g in detachnet.find_widths(model, (3, 64, 64)) if not g.reason}
    small, large = (choose(channels, width, order) for width in (0.3, 0.6))
    assert bool((small.mask <= large.mask).all())
    assert narrowed(model, (3, 64, 64), order=order).error < 1e-12


def test_narrow_layers_are_not_rounded_to_eights() -> None:
    kept = choose(find(models.Plain(), (3, 8, 8))[1], 0.5)
    assert [(group.name, group.kept) for group in kept.groups] == [("conv1", 2), ("conv2", 4), ("fc", 5)]


def test_another_divisor() -> None:
    kept = choose(CHANNELS, 0.3, divisor=1)
    assert kept.groups[0].kept == 19
    assert "conv1" in str(kept)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (0.0, r"width=0.0: a width is a share of the channels, in \(0, 1\]"),
        ({"conv1": 1.5}, r"width=\{'conv1': 1.5\}: a width is a share"),
        ({"layer1.0.conv": 0.5}, "there are no filters 'layer1.0.conv' that can be left out"),
        ({"fc": 0.5}, r"there are no filters 'fc' that can be left out\n.*'fc' stays whole: it is the output"),
        ({"bn1": 0.5}, r"there are no filters 'bn1' that can be left out\n.*find_widths"),
        ({"conv": 0.5}, r"there are no filters 'conv' that can be left out[\s\S]*nearest .*conv1"),
        ({"conv1": 0.5, "layer1": 0.75}, "two widths for the filters 'conv1': of 'conv1' and of 'layer1'"),
        ({"layer3": 0.5, "layer3.0": 0.5}, "two widths for the filters 'layer3.0.conv1': of 'layer3' and of"),
    ],
)
def test_refusals(width: float | dict[str, float], message: str) -> None:
    with pytest.raises(detachnet.WidthError, match=message):
        choose(CHANNELS, width)


@pytest.mark.slow
def test_the_choice_leaves_channels_as_they_are() -> None:
    """Shuffles couple channels, in a copy."""
    _, channels = find(detachnet.create_model("torchvision:shufflenet_v2_x0_5"), (3, 64, 64))
    before = list(channels.atoms.parent)
    choose(channels, 0.5)
    assert [channels.atoms.find(atom) for atom in before] == [
        channels.atoms.find(atom) for atom in range(len(before))
    ]
    assert len(channels.atoms.parent) == len(before)


def test_a_plain_network_comes_out() -> None:
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    result = narrowed(model, (3, 64, 64))
    narrow = result.narrow
    assert not narrow.training
    assert narrow.get_submodule("layer1.0.conv1").out_channels == 32
    assert narrow.get_submodule("layer1.0.bn1").num_features == 32
    assert narrow.get_submodule("fc").in_features == 256
    assert all(p.is_contiguous() and p.requires_grad for p in narrow.parameters())
    assert {p.data_ptr() for p in narrow.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert all(value.shape == before[name].shape for name, value in model.state_dict().items())
    again = pickle.loads(pickle.dumps(narrow))
    assert torch.equal(again(result.images), narrow(result.images))


def test_hooks_stay_with_the_model() -> None:
    model, seen = resnet(), []
    model.get_submodule("layer1.0.conv1").register_forward_hook(lambda *_: seen.append(1))
    result = narrowed(model, (3, 64, 64))
    result.narrow(result.images)
    assert not seen
    model(result.images)
    assert seen


@pytest.mark.slow
def test_groups_follow() -> None:
    narrow = narrowed(detachnet.create_model("timm:resnet50_gn", num_classes=10), (3, 64, 64)).narrow
    norms = [part for part in narrow.modules() if isinstance(part, nn.GroupNorm)]
    assert norms
    assert all(norm.num_groups == 16 for norm in norms)
    depthwise = narrowed(detachnet.create_model("torchvision:mobilenet_v3_small"), (3, 64, 64)).narrow
    convs = [part for part in depthwise.modules() if isinstance(part, nn.Conv2d) and part.groups > 1]
    assert convs
    assert all(conv.groups == conv.in_channels == conv.out_channels for conv in convs)
