"""Traps: small networks in which channels meet in an awkward way, and what of each is kept at half the width.

All have 3×8×8 images.
"""

import torch
import torch.nn.functional as F
from timm.layers.norm_act import LayerNormAct, LayerNormAct2d
from torch import Tensor, nn


def conv(num_in: int, num_out: int, size: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, size, padding=size // 2, groups=groups)


class Net(nn.Module):
    """a (16 channels), b, then the head over the mean of all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 16), conv(16, 16), nn.Linear(16, 10)
        self.build()

    def build(self) -> None: ...

    def head(self, x: Tensor) -> Tensor:
        return self.h(x.mean((2, 3)))


class ChannelMean(Net):
    """A mean over a's channels divides by their number: they stay."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x) * x.mean(1, keepdim=True).sigmoid())


class SoftmaxOverChannels(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).softmax(1)))


class SoftmaxLayer(Net):
    def build(self) -> None:
        self.soft = nn.Softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.soft(self.a(x))))


class L2Norm(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.normalize(self.a(x), dim=1)))


class Attention(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        q = x.flatten(2)
        return self.head(self.b((q @ (q.transpose(1, 2) @ q).softmax(-1)).view_as(x)))


class SpatialGate(Net):
    """The gate is broadcast over a's channels, which does not couple them."""

    def build(self) -> None:
        self.g = conv(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x * self.g(x).sigmoid()))


class ExpandedGate(SpatialGate):
    """A gate with as many channels as what it meets: all of them go with its one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x) + self.g(x).expand(-1, 16, -1, -1))


class ShiftedAdd(Net):
    """Each channel meets its neighbour: every second one is kept, so that they still do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x) + x.roll(1, 1))


class Crossed(Net):
    """The halves change places, so channel i goes with channel i + 8."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        p, q = x.chunk(2, 1)
        return self.head(self.b(torch.cat([q, p], 1)) + x)


class FixedSplit(Net):
    """Sizes of parts are written into the graph: they follow."""

    def build(self) -> None:
        self.b, self.c = conv(10, 8), conv(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        p, q = torch.split(self.a(x), [10, 6], 1)
        return self.head(torch.cat([self.b(p), self.c(q)], 1))


class FixedSlice(Net):
    def build(self) -> None:
        self.b, self.c = conv(6, 8), conv(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(torch.cat([self.b(x[:, :6]), self.c(x[:, 6:])], 1))


class FixedView(Net):
    """A shuffle with its sizes written into the graph."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x.view(x.shape[0], 4, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(self.b(x))


class FixedFlatten(Net):
    """Behind a flatten, 64 columns belong to each channel."""

    def build(self) -> None:
        self.b = nn.Linear(16 * 64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.a(x).view(-1, 1024)))


class GroupedShuffle(Net):
    """ShuffleNet's first: each group meets all others, so that all go together."""

    def build(self) -> None:
        self.b, self.c = conv(16, 16, 3, 4), conv(16, 16, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        n, c, h, w = x.shape
        return self.head(self.c(x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)))


class ShuffleLayer(Net):
    """What is kept is a product of the two axes of the shuffle."""

    def build(self) -> None:
        self.shuffle = nn.ChannelShuffle(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.shuffle(self.a(x))))


class Maxout(Net):
    def build(self) -> None:
        self.b = conv(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x.view(x.shape[0], 2, 8, *x.shape[2:]).amax(1)))


class SpaceToDepth(Net):
    def build(self) -> None:
        self.b = conv(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.pixel_unshuffle(self.a(x), 2)))


class PixelShuffle(Net):
    """Four channels make one: what b reads is not along one axis."""

    def build(self) -> None:
        self.b, self.shuffle = conv(4, 16), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.shuffle(self.a(x))))


class PlainParameters(Net):
    """One for each channel, one for each pixel, one for all."""

    def build(self) -> None:
        self.p = nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5)
        self.t = nn.Parameter(torch.rand(1, 1, 8, 8))
        self.s = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b((self.a(x) * self.p + self.t) * self.s))


class PlainBuffer(Net):
    """A buffer with an element for each channel and pixel."""

    def build(self) -> None:
        self.register_buffer("p", torch.rand(16, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x) + self.p))


class ScaledByWidth(Net):
    """A number of channels goes into the values: the narrower network would not compute the same."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x * x.shape[1] ** -0.5))


class MadeTensor(Net):
    """A tensor the forward pass makes is no tensor of atoms; its channels are always there."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        ramp = torch.arange(16, dtype=x.dtype, device=x.device).view(1, 16, 1, 1) + x.shape[0]
        return self.head(self.b(x * ramp))


class PaddedShortcut(Net):
    """A shortcut padded with channels of zeros: what meets them stays."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)) + F.pad(x, (0, 0, 0, 0, 0, 13)))


class NewTensor(Net):
    """A tensor made in the type of another."""

    def build(self) -> None:
        self.b = conv(18, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(torch.cat([x, x.new_ones(x.shape[0], 2, 8, 8)], 1)))


class NewTensorAsWide(Net):
    """As many channels of ones as a has: the narrower network would have fewer."""

    def build(self) -> None:
        self.b = conv(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(torch.cat([x, x.new_ones(x.shape)], 1)))


class OneChannel(Net):
    """Channels by their numbers, for all others: they stay, and their numbers follow."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x) * x[:, 12:13] * x[:, 3, None].sigmoid())


class SmallParts(Net):
    """Parts of which nothing would be left."""

    def build(self) -> None:
        self.p, self.b, self.c = conv(3, 2), conv(1, 16), conv(1, 16)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.p(x).chunk(2, 1)
        return self.head(self.b(one) + self.c(other))


class MeanOfParts(Net):
    """Means over eight neighbours, and over every second channel."""

    def build(self) -> None:
        self.a, self.b, self.h = conv(3, 64), conv(8, 16), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x.view(x.shape[0], -1, 8, 8, 8).mean(2))
        return self.head(x.view(x.shape[0], 2, -1, 8, 8).amax(1))


class FunctionalNorms(Net):
    """Their sizes are written into the graph, or come from a shape."""

    def build(self) -> None:
        self.w, self.v = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = F.group_norm(x, x.shape[1] // 4, self.w)
        x = F.batch_norm(x, self.v, self.w, training=False)
        return self.head(self.b(F.instance_norm(x)))


class NormsWithActivation(Net):
    """timm's layer norms with an activation, which call the norm as a function."""

    def build(self) -> None:
        self.n, self.m = LayerNormAct2d(16, act_layer=nn.GELU), LayerNormAct(16, act_layer=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.n(self.a(x)))
        return self.h(self.m(x.flatten(2).transpose(1, 2)).mean(1))


class TwoScales(Net):
    """Other channels in other rows: what b reads is not along one axis."""

    def build(self) -> None:
        self.c = conv(3, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.cat([self.a(x), self.c(x)], 2)))


class ChannelsAsBatch(Net):
    """One convolution for each channel alone."""

    def build(self) -> None:
        self.c = conv(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(self.c(x.reshape(-1, 1, 8, 8)).reshape(-1, 16, 8, 8)))


class PaddedWithOnes(Net):
    """Channels of ones behind those of a: they are always there."""

    def build(self) -> None:
        self.b = conv(18, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.pad(self.a(x), (0, 0, 0, 0, 0, 2), mode="constant", value=1.0)))


class ConcatenatedImage(Net):
    """The image's channels stay, those of a go."""

    def build(self) -> None:
        self.b = conv(19, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.cat([x, self.a(x)], 1)))


class Depthwise(Net):
    """Two channels for each that is read."""

    def build(self) -> None:
        self.d, self.b = conv(16, 32, 3, 16), conv(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.d(self.a(x))))


class GroupNorm(Net):
    """Called as a layer with 4 groups, and as a function with 8."""

    def build(self) -> None:
        self.n = nn.GroupNorm(4, 16)
        self.w = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.group_norm(self.b(self.n(self.a(x))), 8, self.w))


class OneGroup(Net):
    """A group norm with one group normalizes what there is."""

    def build(self) -> None:
        self.n = nn.GroupNorm(1, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.n(self.a(x))))


class ChannelsLast(Net):
    """A permute, a layer norm and a linear layer."""

    def build(self) -> None:
        self.n, self.l = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.l(self.n(self.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)))


class Transposed(Net):
    def build(self) -> None:
        self.b = nn.ConvTranspose2d(16, 16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


class PReLU(Net):
    def build(self) -> None:
        self.act = nn.PReLU(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.act(self.a(x))))


class Twice(Net):
    """b runs twice, so what it makes is what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.b(self.a(x))))


class TiedWeight(Net):
    """b's weight is read elsewhere, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(self.b(self.a(x)), self.b.weight, padding=1))


class InPlace(Net):
    """A value that is changed in place, while the result of that is not used."""

    def build(self) -> None:
        self.c = conv(3, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.add_(self.c(x))
        return self.head(self.b(y))


class ZeroNorm(Net):
    """A last norm that starts with zero would hide what is wrong in front of it."""

    def build(self) -> None:
        self.n = nn.BatchNorm2d(16)
        nn.init.zeros_(self.n.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.n(self.b(x)))


class EmptySequential(Net):
    def build(self) -> None:
        self.nothing = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.nothing(self.a(x))))


class OwnConvolution(Net):
    """A class of one's own that is a convolution, but runs otherwise."""

    class Flipped(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.flip(1))

    def build(self) -> None:
        self.b = self.Flipped(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


class OwnLayers(Net):
    """Layers of one's own without children are traced into, and those inside of them."""

    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(16) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain[:, None, None]

    class Shuffle(nn.Module):
        def forward(self, x: Tensor, groups: int = 4) -> Tensor:
            n, c, h, w = x.shape
            assert c % groups == 0
            return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def build(self) -> None:
        self.swish, self.scale, self.shuffle = self.Swish(), self.Scale(), self.Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.shuffle(self.scale(self.swish(self.a(x))))))


class LargeParameter(Net):
    """An element for each of half a million pixels: what meets it stays."""

    def build(self) -> None:
        self.p = nn.Parameter(torch.rand(1, 16, 160, 160))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x) + self.p[:, :, :8, :8]))


class ComputedWeight(Net):
    def build(self) -> None:
        self.b = nn.utils.parametrizations.weight_norm(conv(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


class Many(Net):
    """Split, cat, view and shuffle in one."""

    def build(self) -> None:
        self.n = nn.BatchNorm2d(16)
        self.b, self.c, self.d = conv(8, 16), conv(8, 8, 1), conv(24, 24, 3, 12)
        self.e, self.h = conv(24, 32), nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.n(self.a(x)).relu().split(8, 1)
        x = self.d(torch.cat([self.b(p), self.c(q)], 1))
        n, c, h, w = x.size()
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.h(F.max_pool2d(self.e(x), 2).view(n, 512))


BOTH = {"a": 8, "b": 8}
TRAPS: dict[type[nn.Module], dict[str, int]] = {
    ChannelMean: {"a": 16, "b": 8},
    SoftmaxOverChannels: {"a": 16, "b": 8},
    SoftmaxLayer: {"a": 16, "b": 8},
    L2Norm: {"a": 16, "b": 8},
    Attention: {"a": 16, "b": 8},
    SpatialGate: {"a": 8, "g": 1, "b": 8},
    ExpandedGate: {"a": 8, "b": 16},
    ShiftedAdd: {"a": 8},
    Crossed: {"a": 8},
    FixedSplit: {"a[0:10]": 5, "a[10:16]": 3, "b": 4, "c": 4},
    FixedSlice: {"a[0:6]": 3, "a[6:16]": 5, "b": 4, "c": 4},
    FixedView: BOTH,
    FixedFlatten: BOTH,
    GroupedShuffle: {"a": 16},
    ShuffleLayer: BOTH,
    Maxout: BOTH,
    SpaceToDepth: BOTH,
    PixelShuffle: {"a": 16},
    PlainParameters: BOTH,
    PlainBuffer: BOTH,
    ScaledByWidth: {"a": 16, "b": 8},
    MadeTensor: {"a": 16, "b": 8},
    PaddedShortcut: {"a": 8, "b": 16},
    PaddedWithOnes: BOTH,
    NewTensor: BOTH,
    NewTensorAsWide: {"a": 16, "b": 8},
    OneChannel: {"a[0:3+2]": 7, "a[3:4+1]": 2, "b": 8},
    SmallParts: {"p[0:1]": 1, "p[1:2]": 1, "b": 8},
    MeanOfParts: {"a": 32, "b": 8},
    FunctionalNorms: BOTH,
    NormsWithActivation: BOTH,
    TwoScales: {"a": 16, "c": 16},
    ChannelsAsBatch: {"a": 16, "b": 8},
    ConcatenatedImage: BOTH,
    Depthwise: BOTH,
    GroupNorm: BOTH,
    OneGroup: BOTH,
    ChannelsLast: {"a": 8, "l": 8, "b": 8},
    Transposed: BOTH,
    PReLU: BOTH,
    Twice: {"a": 8},
    TiedWeight: {"a": 16, "b": 16},
    InPlace: BOTH,
    ZeroNorm: {"a": 8},
    EmptySequential: BOTH,
    OwnConvolution: {"a": 16},
    OwnLayers: BOTH,
    LargeParameter: {"a": 16, "b": 8},
    ComputedWeight: {"a": 16},
    Many: {"a[0:8]": 4, "a[8:16]": 4, "b": 8, "e": 16},
}
