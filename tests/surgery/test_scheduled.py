"""What a training loop schedules is followed wherever a forward pass reads it from."""

import contextvars
import functools
import sys
import threading
import types
from argparse import Namespace
from collections import ChainMap, UserDict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import detachnet
from tests.models import Around

pytestmark = pytest.mark.slow

SIZE = (3, 16, 16)
OPTIONS, THREAD, CONTEXT = Namespace(t=1.0), threading.local(), contextvars.ContextVar("t", default=1.0)
THREAD.t = 1.0
HELD = {"t": 1.0}
SCALE = 1.0
VIEW = types.MappingProxyType(HELD)
here = sys.modules[__name__]


class Settings:
    t: ClassVar[float] = 1.0

    class Inner:
        t: ClassVar[float] = 1.0

    @classmethod
    def get(cls) -> float:
        return cls.t

    @staticmethod
    def static() -> float:
        return SCALE


class Special(Settings):
    pass


class Schedule:
    def __call__(self) -> float:
        return SCALE


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args) * SCALE

    return wrapper


def get() -> float:
    return SCALE


class Middle(nn.Module):
    """Multiplies by what a way to read gives."""

    class Config:
        t: ClassVar[float] = 1.0

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)
        vars(self).update(held)

    @property
    def t(self) -> float:
        return SCALE

    def read(self) -> Any:
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv(h) * self.read()
        return out


def put(where: Any, value: Any = 4.0, name: str = "t") -> Callable[[pytest.MonkeyPatch, Any], None]:
    return lambda patch, middle: patch.setattr(where, name, value)


def of_held(change: Callable[[Any], None]) -> Callable[[pytest.MonkeyPatch, Any], None]:
    return lambda patch, middle: change(middle.held)


def setting(held: Any, key: Any, value: float = 4.0) -> None:
    held[key] = value


CASES: dict[str, tuple[Callable[[Any], Any], Any, Callable[[pytest.MonkeyPatch, Any], None]]] = {
    "global namespace": (lambda self: OPTIONS.t, None, put(OPTIONS)),
    "own namespace": (lambda self: self.held.t, Namespace(t=1.0), of_held(lambda held: setattr(held, "t", 4.0))),
    "user dict": (lambda self: self.held["t"], UserDict(t=1.0), of_held(lambda held: setting(held, "t"))),
    "chain map": (lambda self: self.held["t"], ChainMap({"t": 1.0}), of_held(lambda held: setting(held, "t"))),
    "view of a dict": (lambda self: VIEW["t"], None, lambda patch, middle: patch.setitem(HELD, "t", 4.0)),
    "of the thread": (lambda self: THREAD.t, None, put(THREAD)),
    "class method": (lambda self: Settings.get(), None, put(Settings)),
    "static method": (lambda self: Settings.static(), None, put(here, name="SCALE")),
    "inherited": (lambda self: Special.t, None, put(Settings)),
    "class in a class": (lambda self: Settings.Inner.t, None, put(Settings.Inner)),
    "class in the module": (lambda self: self.Config.t, None, put(Middle.Config)),
    "object's class": (lambda self: self.held.t, Settings(), put(Settings)),
    "helper": (lambda self: self.held(), Schedule(), put(here, name="SCALE")),
    "function of a module": (lambda self: here.get(), None, put(here, name="SCALE")),
    "class of a module": (lambda self: here.Settings.t, None, put(Settings)),
    "property": (lambda self: self.t, None, put(here, name="SCALE")),
    "function in a list": (lambda self: self.held[0](), [lambda: SCALE], put(here, name="SCALE")),
    "decorated": (scaled(lambda self: 1.0), None, put(here, name="SCALE")),
    "long list": (
        lambda self: self.held[700],
        [1.0] * 1000,
        of_held(lambda held: setting(held, 700)),
    ),
    "long array": (
        lambda self: float(self.held[70_000]),
        np.ones(100_000, dtype=np.float32),
        of_held(lambda held: setting(held, 70_000)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_scheduled_is_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, held, change = CASES[name]
    kind = type("Reading", (Middle,), {"read": read, "__module__": __name__})
    torch.manual_seed(0)
    model = Around(kind(held=held)).eval()
    net = detachnet.make_detachable(model, ["a"], SIZE).eval()
    images = torch.randn(2, *SIZE)
    before = net(images, which="all")
    change(monkeypatch, net.base.mid)
    model.mid.held = net.base.mid.held
    expected = model(images)
    assert not torch.allclose(expected, before["base"])
    for _ in range(2):
        torch.testing.assert_close(net(images), expected)
        assert not torch.allclose(net(images, which="all")["sub0"], before["sub0"])


def test_a_context_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Reading", (Middle,), {"read": lambda self: CONTEXT.get(), "__module__": __name__})
    model = Around(kind()).eval()
    net = detachnet.make_detachable(model, ["a"], SIZE).eval()
    images = torch.randn(2, *SIZE)
    token = CONTEXT.set(4.0)
    try:
        torch.testing.assert_close(net(images), model(images))
    finally:
        CONTEXT.reset(token)
    torch.testing.assert_close(net(images), model(images))


class Collector:
    """A context variable in an object, as transformers has one."""

    def __init__(self) -> None:
        self.variable = contextvars.ContextVar[Any]("collected", default=None)


COLLECTED = Collector()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Any:
        token = COLLECTED.variable.set({"layers": 1})
        try:
            return self.layers(x)
        finally:
            COLLECTED.variable.reset(token)


def test_a_context_variable_that_is_set_for_a_pass_keeps_nothing_whole() -> None:
    net = detachnet.make_detachable(Around(Encoder()), ["a"], SIZE)
    assert not net.plan.whole
