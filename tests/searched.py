"""A tiny network, trained on colours, whose sub-models can all be listed."""

from functools import cache
from itertools import product

import torch
from torch import Tensor, nn

import detachnet
from detachnet.data.datasets import Split
from detachnet.facts import DataInfo, Facts
from detachnet.selection.candidate import Candidate
from detachnet.selection.space import Cost, Space

CLASSES = ("red", "green", "blue", "grey")
SIZE = (3, 8, 8)


class Tiny(nn.Module):
    """Two blocks with a skip connection, 16 channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.one, self.two = Block(), Block()
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.outer = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.last(self.outer(self.relu(self.norm(self.inner(x))))))


def images(count: int, seed: int) -> Split:
    """Noise, with more of one colour; grey has of all."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    pixels = 96 + 64 * torch.rand(count, *SIZE, generator=draw)
    for i, label in enumerate(labels.tolist()):
        if label < 3:
            pixels[i, label] += 10
    return Split(pixels.to(torch.uint8), labels, CLASSES)


DATA = DataInfo(name="colours", classes=CLASSES, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


@cache
def _weights() -> dict[str, Tensor]:
    """Those of a training of a second."""
    torch.manual_seed(0)
    model, split = Tiny().train(), images(400, 1)
    inputs = (split.images.float() / 255 - 0.5) / 0.2
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(40):
        some = torch.arange(50) + 50 * (step % 8)
        loss = nn.functional.cross_entropy(model(inputs[some]), split.labels[some])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


def trained(norm: str = "private") -> detachnet.DetachableNet:
    """A family of the tiny network and one sub-model."""
    model = Tiny()
    model.load_state_dict(_weights())
    cuts = {"short": detachnet.SubModel(drop=["one:two"])}
    net = detachnet.make_detachable(model.eval(), cuts, SIZE, norm=norm, check="none")  # type: ignore[arg-type]
    net.facts = Facts(data=DATA, trained=("base", "short"))
    return net


@cache
def space_of_tiny() -> Space:
    """What can be left out of it; tests share what is known of its candidates."""
    return Space(trained())


def everything(space: Space, cost: Cost) -> list[Candidate]:
    """All candidates of the tiny network; filters of a block that is left out stay."""
    found = []
    inside = {"stem:one": ["one.inner"], "one:two": ["two.inner"], "stem:two": ["one.inner", "two.inner"]}
    for drop in ((), *((span,) for span in inside)):
        groups = [name for name in space.groups if not any(name in inside[span] for span in drop)]
        for eighths in product((8, 4), repeat=len(groups)):
            candidate = Candidate(drop).with_widths(dict(zip(groups, eighths, strict=True)))
            assert cost(candidate) is not None
            found.append(candidate)
    return found
