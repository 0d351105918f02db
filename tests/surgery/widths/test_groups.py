"""Which filters of a network go together, what they cost, and what keeps them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detachnet
from tests import models


def test_groups_of_a_plain_network() -> None:
    """conv1 and conv2 with their norms; the head gives the output."""
    groups = detachnet.find_widths(models.Plain(), (3, 8, 8))
    assert [group.name for group in groups] == ["conv1", "conv2", "fc"]
    first, second, head = groups
    assert (first.channels, first.units, first.reason) == (4, 4, "")
    assert [str(place) for place in first.makers] == ["conv1"]
    assert [str(place) for place in first.readers] == ["bn1", "conv2"]
    assert first.macs == 64 * 3 * 9 * 4 + 16 * 4 * 9 * 8
    assert first.num_params == 4 * 27 + 4 + 8 + 8 * 4 * 9
    assert second.num_params == 8 * 36 + 8 + 16 + 8 * 5
    assert head.reason == "it is the output"


def test_a_skip_connection_makes_one_group() -> None:
    groups = detachnet.find_widths(models.Skip(), (3, 8, 8))
    assert [group.name for group in groups] == ["stem", "head"]
    assert [place.layer for place in groups[0].makers] == ["stem", "branch"]
    assert [place.layer for place in groups[0].readers] == ["branch", "head"]


def test_resnet18() -> None:
    groups = detachnet.find_widths(detachnet.create_model("torchvision:resnet18"))
    assert len(groups) == 13
    stream = next(group for group in groups if group.name == "layer2.0.conv2")
    assert [str(p) for p in stream.makers] == ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]
    assert stream.macs == pytest.approx(stream.macs_of_base * 1_814_073_344)


def test_the_model_is_left_as_it_is() -> None:
    model = models.Plain().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    detachnet.find_widths(model, (3, 8, 8))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_prints_as_a_table() -> None:
    lines = str(detachnet.find_widths(models.Plain(), (3, 8, 8))).splitlines()
    assert lines[0].split("  ")[0] == "filters"
    assert lines[1].split() == ["conv1", "4", "1", "2", "11.5", "k", "100", "%", "408"]
    assert lines[3].endswith("it is the output")


class Split(nn.Module):
    """Two halves of one layer's channels, read by different layers: two groups with their ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.conv(x).chunk(2, 1)
        return self.one(one) + self.other(other)


def test_parts_of_a_layer_have_names_of_their_own() -> None:
    groups = detachnet.find_widths(Split(), (3, 4, 4))
    assert [(group.name, group.channels) for group in groups] == [("conv[0:4]", 4), ("conv[4:8]", 4), ("one", 4)]
    assert groups[0].makers[0].ranges == ((0, 4),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "filters", "reason"),
    [
        ("timm:eca_resnet33ts", "stem.conv2.conv", ""),
        (
            "timm:eca_resnet33ts",
            "stages.0.0.conv2_kxk.conv",
            "'stages.0.0.attn.conv': its channels are not along one",
        ),
    ],
)
def test_what_is_not_known_says_so(name: str, filters: str, reason: str) -> None:
    groups = detachnet.find_widths(detachnet.create_model(name))
    assert reason in next(group.reason for group in groups if group.name == filters)


def test_kept_whole_as_asked() -> None:
    kwargs: dict[str, Any] = {"leaf_modules": [nn.Sequential]}
    groups = detachnet.find_widths(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU())), (3, 4, 4), **kwargs
    )
    assert [(group.name, group.reason) for group in groups] == [
        ("0", "'1': Sequential is a layer that is not known")
    ]
