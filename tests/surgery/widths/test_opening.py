"""Layers that a trace keeps whole are traced into."""

import pytest
import torch
from torch import Tensor, nn

import detachnet
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import NO_LEAVES
from detachnet.surgery.widths.layers import is_known
from detachnet.surgery.widths.opening import open_layers
from tests.widths import narrowed, randomize


class Gate(nn.Module):
    """A layer without children, so that a trace keeps it whole."""

    def forward(self, x: Tensor, power: float = 2.0) -> Tensor:
        if x.shape[1] > 4:
            x = x**power
        return x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :4], x[:, 4:]


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x


class Cached(nn.Module):
    """What its first pass leaves, the later ones read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid.shape[0] != x.shape[2]:
            self.fill(x.shape[2])
        return x + self.grid[None, None, :, None]

    def fill(self, size: int) -> None:
        self.grid = torch.linspace(0.0, 1.0, size, dtype=torch.double)


class Dropping(nn.Module):
    """Draws its mask in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.5).to(x)


class Queue(nn.Module):
    """What a pass leaves in a list, the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = [torch.zeros(())]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.seen[0]
        self.seen[0] = x.detach().mean()
        return x


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.layer, self.b = nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.a(x))
        return self.b(torch.cat(list(x), 1) if isinstance(self.layer, Pair) else x)


def reasons(net: nn.Module, **kwargs: list[type[nn.Module]]) -> list[str]:
    return [group.reason for group in detachnet.find_widths(net, (3, 4, 4), **kwargs)]  # type: ignore[arg-type]


def test_a_layer_with_a_decision_and_a_default() -> None:
    assert reasons(Net(Gate())) == ["", "it is the output"]
    result = narrowed(Net(Gate()), (3, 4, 4))
    assert (result.error, result.narrow.get_submodule("a").out_channels) == (0.0, 4)


def test_nothing_inside() -> None:
    assert reasons(Net(Same())) == ["", "it is the output"]


def test_what_the_user_keeps_whole_stays() -> None:
    assert reasons(Net(Gate()), leaf_modules=[Gate])[0] == "'layer': Gate is a layer that is not known"


def test_what_cannot_be_traced_stays() -> None:
    assert reasons(Net(ByValue()))[0] == "'layer': ByValue is a layer that is not known"


@pytest.mark.parametrize("has_run", [False, True])
def test_what_assigns_what_it_holds_stays(has_run: bool) -> None:
    net = Net(Cached()).double()
    if has_run:
        net(torch.zeros(1, 3, 4, 4, dtype=torch.double))
    assert reasons(net)[0] == "'layer': Cached is a layer that is not known"
    assert narrowed(net, (3, 4, 4)).error == 0.0


@pytest.mark.parametrize("kind", [Dropping, Queue])
def test_what_a_graph_cannot_do_alone_stays(kind: type[nn.Module]) -> None:
    assert reasons(Net(kind()))[0] == f"'layer': {kind.__name__} is a layer that is not known"


@pytest.mark.slow
def test_the_same_values_have_the_same_names() -> None:
    model = randomize(detachnet.create_model("timm:nf_resnet26"))
    traced = trace(model, (3, 64, 64)).eval
    opened = open_layers(traced, is_known, NO_LEAVES)
    assert len(opened.graph.nodes) > len(traced.graph.nodes)
    assert opened.names.keys() >= traced.names.keys()
    for name, node in traced.names.items():
        assert opened.values[opened.names[name]] == traced.values[node]
    assert sum(opened.macs.values()) == sum(traced.macs.values())
    assert open_layers(opened, is_known, NO_LEAVES) is opened


def test_nothing_to_open() -> None:
    traced = trace(detachnet.create_model("torchvision:resnet18"), (3, 64, 64)).eval
    assert open_layers(traced, is_known, NO_LEAVES) is traced


@pytest.mark.slow
def test_the_whole_width_is_the_model() -> None:
    result = narrowed(detachnet.create_model("timm:nf_resnet26", num_classes=10), (3, 64, 64), 1.0)
    assert result.changed < 1e-12
