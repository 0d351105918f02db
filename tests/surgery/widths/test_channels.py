"""What the traps keep at half the width: the narrower network equals the one whose dropped columns are zero."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from tests.traps import (
    TRAPS,
    Attention,
    ChannelMean,
    ComputedWeight,
    GroupNorm,
    MadeTensor,
    Net,
    OneChannel,
    OwnConvolution,
    PaddedShortcut,
    PixelShuffle,
    ScaledByWidth,
    SoftmaxLayer,
    SpatialGate,
    TiedWeight,
)
from tests.widths import find, narrowed


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_traps(trap: Callable[[], nn.Module]) -> None:
    result = narrowed(trap(), (3, 8, 8))
    kept = {g.name: g.kept for g in result.kept.groups if g.reason != "it is the output"}
    assert result.error < 1e-12
    assert kept == TRAPS[trap]  # type: ignore[index]


def test_the_number_of_a_channel_follows() -> None:
    result = narrowed(OneChannel(), (3, 8, 8), order={"a[0:3+2]": [*range(13, 0, -1)]})
    layer = result.kept.channels.layers["base.a"]
    assert layer.makes is not None
    assert result.kept.indices(layer.makes).tolist() == [3, 8, 9, 10, 11, 12, 13, 14, 15]
    assert result.error < 1e-12


def reasons(net: nn.Module) -> list[str]:
    """Why channels stay, and what made one class of several."""
    _, channels = find(net, (3, 8, 8))
    return [*channels.atoms.whole.values(), *channels.atoms.joined.values()]


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (ChannelMean, "mean couples all of its channels"),
        (SoftmaxLayer, "'soft' couples all of its channels"),
        (GroupNorm, "'n' normalizes groups of channels"),
        (GroupNorm, "'group_norm' normalizes groups of channels"),
        (Attention, "'matmul': matmul is an operation that is not known"),
        (SpatialGate, "it is broadcast over channels"),
        (PixelShuffle, "'b': its channels are not along one axis"),
        (PaddedShortcut, "it meets the image"),
        (MadeTensor, "a constant of the forward pass"),
        (TiedWeight, "'b' is called, and its weights are read elsewhere"),
        (OwnConvolution, "'b': conv2d is an operation that is not known"),
        (ComputedWeight, "'b': it computes its weight when it runs"),
    ],
)
def test_reasons(net: Callable[[], nn.Module], why: str) -> None:
    assert why in reasons(net())


def test_what_cannot_follow_says_so() -> None:
    kept = narrowed(ScaledByWidth(), (3, 8, 8)).kept
    assert (
        next(g.reason for g in kept.groups if g.name == "a")
        == "'mul': a number that goes into it follows the width"
    )


def test_what_timm_keeps_whole_stays() -> None:
    from timm.layers import CondConv2d

    class Conditional(Net):
        def build(self) -> None:
            self.b, self.r = CondConv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.head(self.b(x, self.r(x.mean((2, 3)))))

    assert "'b': CondConv2d takes or gives more than one tensor" in reasons(Conditional())
