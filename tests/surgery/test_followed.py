"""What is changed in a family's base-model afterwards is what every view runs, or a warning says it is not."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

import detachnet
from tests.helpers import assert_joint_equals_separate
from tests.models import Around

pytestmark = pytest.mark.slow

SIZE = (3, 16, 16)


class Kept(nn.Module):
    """Kept whole, with a norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.t = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), 1.0

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            level = h.mean((1, 2, 3), keepdim=True)
        out: Tensor = self.bn(self.conv(h)) * self.t + level
        return out


class Noted(nn.GroupNorm):
    """With tensors in a tuple, which cannot be compared."""

    def __init__(self) -> None:
        super().__init__(4, 8)
        self.levels = (torch.zeros(2), torch.ones(2))


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.t = nn.Parameter(torch.rand(8, 1, 1) + 0.5), 1.0

    def forward(self, h: Tensor) -> Tensor:
        return h * self.w * self.t


def layers(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), *more)


def family(middle: nn.Module, **options: str) -> detachnet.DetachableNet:
    torch.manual_seed(0)
    cuts = {"late": "a", "slim": detachnet.SubModel(width=0.5)} if not options else {"late": "a"}
    return detachnet.make_detachable(Around(middle).double(), cuts, SIZE, **options).eval()  # type: ignore[arg-type]


def tripled(self: nn.Sequential, h: Tensor) -> Tensor:
    return 3 * nn.Sequential.forward(self, h)  # type: ignore[no-any-return]


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "attribute of what is kept whole": (Kept, lambda mid: setattr(mid, "t", 5.0)),
    "layer of what is kept whole": (Kept, lambda mid: setattr(mid, "conv", nn.Conv2d(8, 8, 3, 1, 1).double())),
    "its padding": (Kept, lambda mid: setattr(mid.conv, "padding_mode", "circular")),
    "attribute of a layer": (lambda: layers(Gain()), lambda mid: setattr(mid[1], "t", 9.0)),
    "eps of a layer that holds tensors": (lambda: layers(Noted()), lambda mid: setattr(mid[1], "eps", 10.0)),
    "eps": (lambda: layers(nn.GroupNorm(4, 8)), lambda mid: setattr(mid[1], "eps", 10.0)),
    "dilation": (
        lambda: layers(nn.ReLU()),
        lambda mid: [setattr(mid[0], name, (2, 2)) for name in ("padding", "dilation")],
    ),
    "layer": (
        lambda: layers(nn.ReLU()),
        lambda mid: mid.__setitem__(0, nn.Conv2d(8, 8, 3, 1, 1).double()),
    ),
    "one more": (lambda: layers(nn.ReLU()), lambda mid: mid.append(nn.Conv2d(8, 8, 1).double())),
    "one less": (lambda: layers(nn.ReLU()), lambda mid: mid.__delitem__(1)),
    "own forward": (
        lambda: layers(nn.ReLU()),
        lambda mid: setattr(mid, "forward", MethodType(tripled, mid)),
    ),
    "another norm": (lambda: layers(nn.GroupNorm(4, 8)), lambda mid: mid.__setitem__(1, nn.Identity())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_view_follows(name: str, tmp_path: Path) -> None:
    middle, change = CHANGES[name]
    net, images = family(middle()), torch.randn(3, *SIZE, dtype=torch.double)
    before = net(images, which="all")
    torch.manual_seed(1)
    change(net.base.mid)
    after = net(images, which="all")
    torch.testing.assert_close(after["base"], net.base(images))
    again = copy.deepcopy(net)
    for model in net.names:
        assert not torch.allclose(after[model], before[model])
        torch.testing.assert_close(net(images, which=model), after[model])
        torch.testing.assert_close(again(images, which=model), after[model])
        torch.testing.assert_close(net.detach(model)(images), after[model])
    assert_joint_equals_separate(net, images)


def test_what_is_shared_stays_shared() -> None:
    net = family(Kept())
    own = net.norms.late.mid
    assert own.conv is net.base.mid.conv
    assert own.bn is not net.base.mid.bn
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    net(torch.zeros(1, *SIZE, dtype=torch.double))
    assert net.norms.late.mid.conv.weight is net.base.mid.conv.weight
    assert copy.deepcopy(net).norms.late.mid.conv is not net.base.mid.conv


@pytest.mark.parametrize("norm", ["private", "shared"])
def test_norms_on_the_statistics_of_a_batch_in_evaluation(norm: str) -> None:
    """As test-time adaptation sets them."""
    net = family(layers(nn.BatchNorm2d(8)), norm=norm)
    images = torch.randn(4, *SIZE, dtype=torch.double)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.train()
            part.momentum = 0.0
    joint = net(images, which="all")
    for name in net.names:
        torch.testing.assert_close(joint[name], net(images, which=name))


def test_a_norm_with_statistics_that_is_put_there_is_each_models_own() -> None:
    net = family(layers(nn.GroupNorm(4, 8)))
    net.base.mid[1] = nn.BatchNorm2d(8).double()
    images = torch.randn(4, *SIZE, dtype=torch.double)
    assert_joint_equals_separate(net, images)
    assert "norms.late.mid.1.running_mean" in net.state_dict()
    again = copy.deepcopy(net).eval()
    for name in net.names:
        torch.testing.assert_close(again(images, which=name), net.eval()(images, which=name))


def test_hooks_that_are_added_to_what_was_opened_are_told(caplog: pytest.LogCaptureFixture) -> None:
    net, images = family(layers(nn.ReLU())), torch.zeros(1, *SIZE, dtype=torch.double)
    net.base.mid.register_forward_hook(lambda module, given, out: None)
    with caplog.at_level(logging.WARNING):
        net(images)
        net(images)
    assert [message for message in caplog.messages if "hooks that were added to 'mid'" in message] == [
        caplog.messages[0]
    ]
    seen: list[object] = []
    net.base.mid[0].register_forward_hook(lambda module, given, out: seen.append(module))
    net(images)
    assert seen
