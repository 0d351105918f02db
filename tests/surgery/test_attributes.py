"""What a forward pass reads and its family follows: attributes that come later, of layers, classes, other code."""

import copy
import datetime
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detachnet
from tests import models

SIZE = (3, 16, 16)
ASKED = {"late": "a", "slim": detachnet.SubModel(width=0.5)}


class Schedule:
    """What a training loop holds, and a model refers to."""

    gain = 2.0


def raised(h: Tensor, act: Any) -> Tensor:
    return h * act.power  # type: ignore[no-any-return]


class Mid(nn.Module):
    """Reads what may be there later, what its layers hold, and a child's mode."""

    gain = 1.0

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(8, 8, 1), nn.ModuleList()
        self.factors, self.schedule = nn.ParameterList([nn.Parameter(torch.ones(1))]), weakref.ref(schedule)
        self.register_buffer("mask", None)
        self.register_parameter("shift", None)
        self.register_buffer("bank", torch.ones(2))
        self.inner = nn.Module()
        self.inner.act, self.inner.rest = nn.ReLU(), nn.Sequential(nn.ReLU())
        self.inner.act.level = self.inner.rest[0].level = 1.0
        self.inner.each = nn.ModuleList([nn.ReLU(), nn.ReLU()])
        for act in self.inner.each:
            act.level, act.power = 1.0, 1.0
        self.conv.scale, self.span, self.wait = 1.0, slice(2), datetime.timedelta(seconds=1)  # type: ignore[assignment]

    def scaled(self, h: Tensor) -> Tensor:
        return h * self.gain

    def forward(self, h: Tensor) -> Tensor:
        h = self.scaled(self.conv(h)) * getattr(self, "late", 1.0) * self.conv.scale * self.schedule().gain
        h = h * self.span.stop * self.wait.total_seconds() * self.bank.shape[0]
        for layer in self.more:
            h = layer(h)
        for factor in self.factors:
            h = h * factor
        h = h if self.mask is None else h * self.mask
        h = h if self.shift is None else h + self.shift
        if self.conv.training:
            h = h * 3
        h = h * self.inner.act.level * self.inner.rest[0].level
        for act in self.inner.each:
            h = raised(h, act) * (3 if act.training else act.level)
        return h * 2 if self.conv.bias is None else h


class Tripled(Mid):
    def scaled(self, h: Tensor) -> Tensor:
        return 3 * h


def of_class(mid: Any) -> None:
    mid.__class__ = Tripled


CHANGES: dict[str, Callable[[Any], object]] = {
    "over a class's": lambda mid: setattr(mid, "gain", 5.0),
    "by getattr": lambda mid: setattr(mid, "late", 5.0),
    "method": lambda mid: setattr(mid, "scaled", lambda h: 5 * h),
    "class": of_class,
    "of a layer": lambda mid: setattr(mid.conv, "scale", 5.0),
    "of a layer inside": lambda mid: setattr(mid.inner.act, "level", 5.0),
    "of a layer by its number": lambda mid: setattr(mid.inner.rest[0], "level", 5.0),
    "of a layer in a loop": lambda mid: setattr(mid.inner.each[1], "level", 5.0),
    "of a layer that a function is given": lambda mid: setattr(mid.inner.each[1], "power", 5.0),
    "mode of a layer in a loop": lambda mid: mid.inner.each[1].train(),
    "by a weak reference": lambda mid: setattr(mid.schedule(), "gain", 5.0),
    "slice": lambda mid: setattr(mid, "span", slice(5)),
    "time": lambda mid: setattr(mid, "wait", datetime.timedelta(seconds=5)),
    "first of a list": lambda mid: mid.more.append(nn.Conv2d(8, 8, 1).double()),
    "parameter of a list": lambda mid: mid.factors.append(nn.Parameter(torch.full((1,), 5.0).double())),
    "buffer in the place of None": lambda mid: setattr(mid, "mask", torch.full((1,), 5.0).double()),
    "parameter in the place of None": lambda mid: setattr(mid, "shift", nn.Parameter(torch.ones(1).double())),
    "longer buffer": lambda mid: setattr(mid, "bank", torch.ones(5).double()),
    "mode of a child": lambda mid: mid.conv.train(),
    "bias of a layer": lambda mid: setattr(mid.conv, "bias", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_comes_later_is_followed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    schedule = Schedule()
    net = detachnet.make_detachable(models.Around(Mid(schedule)).double(), ASKED, SIZE).eval()
    x = torch.randn(4, *SIZE, dtype=torch.double)
    before = net(x, which="all")
    CHANGES[name](net.base.mid)
    joint = net(x, which="all")
    assert "Around is traced again: " in caplog.text
    torch.testing.assert_close(joint["base"], net.base(x))
    for sub in net.names:
        assert not torch.allclose(joint[sub], before[sub])
        if sub != "base":  # which is in evaluation mode as a whole
            torch.testing.assert_close(net.detach(sub)(x), joint[sub])
    assert caplog.text.count("traced again") == 1
    caplog.clear()
    net(x)
    assert not caplog.text


class Replaced(nn.Module):
    """Whose code is another one later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv(h)
        return out


def test_code_that_is_loaded_anew_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook does it."""
    net, x = detachnet.make_detachable(models.Around(Replaced()), ASKED, SIZE).eval(), torch.randn(4, *SIZE)
    monkeypatch.setattr(Replaced, "forward", lambda self, h: 5 * self.conv(h))
    torch.testing.assert_close(net(x), net.base(x))


activation = nn.functional.relu


class Shaping:
    """What a project keeps its choices in."""

    norm = staticmethod(torch.tanh)


def shaped(h: Tensor) -> Tensor:
    return activation(h + 1)


class Opened(nn.Module):
    """Has a layer, so that its forward is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()


class Calling(Opened):
    """Calls functions that variables outside of it hold."""

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = shaped(Shaping.norm(h))
        return out


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (sys.modules[__name__], "activation", nn.functional.silu),
        (sys.modules[__name__], "shaped", torch.sigmoid),
        (Shaping, "norm", staticmethod(lambda h: 2 * h)),
    ],
)
def test_a_function_in_the_place_of_another_is_followed(
    owner: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = detachnet.make_detachable(models.Around(Calling()), ASKED, SIZE).eval(), torch.randn(4, *SIZE)
    before = net(x)
    monkeypatch.setattr(owner, name, other)
    torch.testing.assert_close(net(x), net.base(x))
    assert not torch.allclose(net(x), before)


RATE = 1.0
PRESENT = sys.modules[__name__]


def rate() -> float:
    return RATE


class Held:
    """A global object, whose method reads a global."""

    def rate(self) -> float:
        return RATE


class Named(dict):  # type: ignore[type-arg]
    """A dict with attributes."""

    rate = 1.0


@dataclass
class Config:
    """What a library's model is made by."""

    dtype: torch.dtype = torch.float64


HELD, REGISTRY = Held(), {"rate": rate}


class Level(nn.Module):
    """A layer whose class has what its parent reads."""

    level = 1.0

    def forward(self, h: Tensor) -> Tensor:
        return h.relu()


class Reading(nn.Module):
    """Reads all of that, and imports what it reads."""

    table = torch.ones(1).double()

    def __init__(self) -> None:
        super().__init__()
        self.act, self.config, self.named, self.share = Level(), Config(), Named(), {"of": Decimal(1)}
        self.optimizer = [torch.optim.SGD([torch.zeros(1)], lr=1.0)]

    def forward(self, h: Tensor) -> Tensor:
        from tests import rates

        h = self.act(h.to(self.config.dtype).double()) * self.act.level * self.table * rates.RATE
        rates = self.named.rate * float(self.share["of"]) * self.optimizer[0].param_groups[0]["lr"]
        return h * REGISTRY["rate"]() * HELD.rate() * rates


@pytest.mark.parametrize(
    "change",
    [
        lambda patch, mid: patch.setattr("tests.rates.RATE", 5.0),
        lambda patch, mid: patch.setattr(PRESENT, "RATE", 5.0),
        lambda patch, mid: setattr(mid.act, "level", 5.0),
        lambda patch, mid: patch.setattr(Level, "level", 5.0),
        lambda patch, mid: patch.setattr(Reading, "table", 5 * Reading.table),
        lambda patch, mid: setattr(mid.config, "dtype", torch.bfloat16),
        lambda patch, mid: setattr(mid.named, "rate", 5.0),
        lambda patch, mid: mid.share.update(of=Decimal(5)),
        lambda patch, mid: mid.optimizer[0].param_groups[0].update(lr=5.0),
    ],
)
def test_what_is_read_from_afar_is_followed(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = detachnet.make_detachable(models.Around(Reading()).double(), ASKED, SIZE).eval()
    x = torch.randn(4, *SIZE).double()
    before = net(x)
    change(monkeypatch, net.base.mid)
    torch.testing.assert_close(net(x), net.base(x))
    assert not torch.equal(net(x), before)


class Imports(Opened):
    """Imports in its forward what nothing else of its file names."""

    def forward(self, h: Tensor) -> Tensor:
        from tests.rates import RATE as factor

        return h * factor


class Calls(Opened):
    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of

    def forward(self, h: Tensor) -> Tensor:
        return h * (REGISTRY["rate"]() if self.of == "registry" else HELD.rate())


@pytest.mark.parametrize("mid", [Imports(), Calls("registry"), Calls("object")], ids=lambda mid: str(mid))
def test_each_way_to_a_global_is_followed(mid: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = detachnet.make_detachable(models.Around(mid), ASKED, SIZE).eval(), torch.randn(4, *SIZE)
    before = net(x)
    monkeypatch.setattr(PRESENT, "RATE", 5.0)
    monkeypatch.setattr("tests.rates.RATE", 5.0)
    torch.testing.assert_close(net(x), net.base(x))
    assert not torch.equal(net(x), before)


gain = 1.0


def test_a_variable_that_has_the_name_of_an_attribute_is_none_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As variables of a notebook may."""
    net, x = detachnet.make_detachable(models.Around(Hidden()), ["a"], SIZE).eval(), torch.randn(4, *SIZE)
    monkeypatch.setattr(PRESENT, "gain", 5.0)
    net(x)
    assert "traced again" not in caplog.text


class Floored(Opened):
    """Has a floor for what a training loop schedules, which it reads and then writes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.scale = max(0.1, self.scale)
        return h * self.scale


class Leaves(Opened):
    """Writes an attribute that another class reads under the same name."""

    def forward(self, h: Tensor) -> Tensor:
        self.scale = h.mean()
        return h


@pytest.mark.parametrize("mid", [Floored(), nn.Sequential(Leaves(), Floored())], ids=["own", "other"])
def test_a_name_that_is_written_is_followed_where_it_is_read_first(mid: Any) -> None:
    net, x = detachnet.make_detachable(models.Around(mid), ["a"], SIZE), torch.randn(4, *SIZE)
    floored = next(module for module in net.base.modules() if isinstance(module, Floored))
    for mode in (True, False):
        net.train(mode)(x)
        floored.scale = 5.0 + mode
        torch.testing.assert_close(net(x), net.base(x))


class Slim(nn.Module):
    """A layer that gives as many channels as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.channels = nn.Parameter(torch.randn(8, 8, 1, 1)), 4

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.conv2d(h, self.weight[: self.channels])


class Shaped(nn.Module):
    """Decides by the shapes that its layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.slim, self.pool = Slim(), nn.AdaptiveAvgPool2d(4)

    def forward(self, h: Tensor) -> Any:
        parts, pooled = self.slim(h), self.pool(h)
        return h * (3 if pooled.shape[2] > 2 else 1) + sum(parts[:, i : i + 1] for i in range(parts.shape[1]))


@pytest.mark.parametrize(
    "change",
    [
        lambda mid: setattr(mid.slim, "channels", 8),
        lambda mid: setattr(mid.slim, "channels", 2),
        lambda mid: setattr(mid.pool, "output_size", 2),
    ],
)
def test_what_layers_give_another_shape_by_is_followed(change: Any) -> None:
    net, x = detachnet.make_detachable(models.Around(Shaped()), ["a"], SIZE).eval(), torch.randn(4, *SIZE)
    before = net(x)
    change(net.base.mid)
    torch.testing.assert_close(net(x), net.base(x))
    assert not torch.allclose(net(x), before)


class Hidden(Opened):
    """Goes another way while it is traced, which a gain of one does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = 1.0

    def forward(self, h: Tensor) -> Tensor:
        return h * (self.gain if type(h) is Tensor else 1.0)


def test_a_number_that_varies_for_the_first_time_is_compared() -> None:
    net, x = detachnet.make_detachable(models.Around(Hidden()), ["a"], SIZE).eval(), torch.randn(4, *SIZE)
    assert not net.plan.whole
    net.base.mid.gain = 5.0
    torch.testing.assert_close(net(x), net.base(x))
    assert net.plan.whole.keys() == {"mid"}


class Switched(nn.Module):
    """A branch that is switched on later does what no trace holds, or what one does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind, self.on, self.steps, self.seen = nn.Conv2d(8, 8, 1), kind, False, 0, list[int]()

    def forward(self, h: Tensor) -> Tensor:
        h = self.conv(h)
        if not self.on:
            return h
        if self.kind == "type":
            return h * (2 if type(h) is Tensor else 1)
        if self.kind == "text":
            return h * (2 if "32" in str(h.dtype) else 1)
        return h.relu() * 2


@pytest.mark.parametrize("kind", ["type", "text", "plain"])
def test_what_is_traced_again_is_compared_again(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    net, x = detachnet.make_detachable(models.Around(Switched(kind)), ["a"], SIZE).eval(), torch.randn(4, *SIZE)
    net = copy.deepcopy(net)
    net.base.mid.on = True
    torch.testing.assert_close(net(x), net.base(x))
    joint = net(x, which="all")
    for name in net.names:
        torch.testing.assert_close(joint[name], net.detach(name)(x))
    said = "'mid' is kept whole: its values are others in evaluation mode"
    assert (said in caplog.text) == ("mid" in net.plan.whole) == (kind != "plain")


class Own(models.Around):
    """The same in a model's own forward."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = super().forward(x)
        return h * 2 if self.on and type(h) is Tensor else h


def test_what_a_model_does_itself_is_refused_then() -> None:
    """Also where the trace is the same one."""
    net, x = detachnet.make_detachable(Own(nn.Identity()), ["a"], SIZE).eval(), torch.randn(4, *SIZE)
    before = net(x)
    net.base.on = True
    for _ in range(2):
        with pytest.raises(detachnet.TraceError, match="the traced Own is not the model"):
            net(x)
    net.base.on = False
    torch.testing.assert_close(net(x), before)


class Counting(models.Around):
    """Counts its passes once it is told to."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.on, self.steps = False, 0

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = super().forward(x)
        if self.on:
            self.steps += 1
            h = h * self.steps
        return h


def test_what_no_trace_holds_is_refused_in_every_pass() -> None:
    net, x = detachnet.make_detachable(Counting(), ["a"], SIZE).eval(), torch.randn(4, *SIZE)
    net.base.on = True
    for _ in range(2):
        with pytest.raises(
            detachnet.TraceError, match=r"the traced Counting is not the model[\s\S]*'steps' changed"
        ):
            net(x)


def test_nothing_is_compared_again_that_nothing_was_of() -> None:
    net = detachnet.make_detachable(models.Around(Switched("type")), ["a"], SIZE, check="none").eval()
    net.base.mid.on = True
    assert net(torch.randn(4, *SIZE)).shape == (4, 5)
