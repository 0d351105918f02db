"""What a forward pass changes outside of its module is as it was when a family has been made, and is followed."""

import queue
import sys
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from operator import length_hint
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import detachnet
from detachnet.surgery.outside import Outside
from detachnet.surgery.trace import trace

pytestmark = pytest.mark.slow

SIZE = (3, 8, 8)
Step = Callable[[], float]


class Part(nn.Module):
    """A convolution, times what a function gives, in a module with a child."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.conv, self.step = nn.Conv2d(4, 4, 1), step

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) * self.step()
        return out


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part, self.conv, self.fc = nn.Conv2d(3, 4, 3), part, nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(self.part(self.stem(x))).mean((2, 3)))
        return logits


class Root(Net):
    """The same in the model's own forward."""

    def __init__(self, step: Step) -> None:
        super().__init__(nn.Conv2d(4, 4, 1))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.step()


class Holder:
    """An object and a class with a counter each, and one in a slot."""

    __slots__ = ("__dict__", "slot")
    calls = 0

    def __init__(self) -> None:
        self.slot, self.own = 0, 0

    def step(self) -> float:
        self.own += 1
        return 1 + 0.1 * self.own

    def step_slot(self) -> float:
        self.slot += 1
        return 1 + 0.1 * self.slot


NUMBER, COUNT, QUEUE, OBJECT = 0, iter(range(1, 1000)), deque([1.0], maxlen=2), Holder()
CONFIG = types.ModuleType("config_of_a_users_own")
CONFIG.calls = 0  # type: ignore[attr-defined]
sys.modules[CONFIG.__name__] = CONFIG


def number() -> float:
    global NUMBER
    NUMBER += 1
    return 1 + 0.1 * NUMBER


def made_late() -> float:
    global LATE
    LATE = globals().get("LATE", 0) + 1
    return 1 + 0.1 * LATE


def counted() -> float:
    return 1 + 0.1 * next(COUNT)


def queued() -> float:
    QUEUE.append(QUEUE[-1] + 1)
    return sum(QUEUE)


def of_an_object() -> float:
    OBJECT.own += 1
    return 1 + 0.1 * OBJECT.own


def of_a_class() -> float:
    Holder.calls += 1
    return 1 + 0.1 * Holder.calls


def of_a_module() -> float:
    CONFIG.calls += 1  # type: ignore[attr-defined]
    return 1 + 0.1 * float(CONFIG.calls)  # type: ignore[attr-defined]


def by_default(cache: list[int] = [0], *, counts: Any = {"n": 0}) -> float:  # noqa: B006
    cache[0] += 1
    counts["n"] += 1
    return 1 + 0.1 * (cache[0] + counts["n"])


def iterated(steps: Any = iter(range(1, 1000))) -> float:  # noqa: B008
    return 1 + 0.1 * next(steps)


def attributed() -> float:
    attributed.calls = getattr(attributed, "calls", 0) + 1  # type: ignore[attr-defined]
    return 1 + 0.1 * attributed.calls  # type: ignore[attr-defined]


def enclosing() -> tuple[Step, Callable[[], Any]]:
    calls, seen, sums = 0, set[int](), np.zeros(2)

    def inner() -> int:
        nonlocal calls
        calls += 1
        seen.add(calls)
        sums[0] += calls
        return calls + len(seen)

    return lambda: 1 + 0.1 * inner(), lambda: (calls, sorted(seen), sums.tolist())


def no_number() -> tuple[Step, Callable[[], Any]]:
    total = torch.zeros(())

    def step() -> float:
        with torch.no_grad():
            total.add_(1)
        return 1 + 0.1 * float(total)

    return step, lambda: float(total)


OUTSIDE: dict[str, tuple[Step, Callable[[], Any]]] = {
    "global": (number, lambda: NUMBER),
    "global made late": (made_late, lambda: globals().get("LATE")),
    "iterator": (counted, lambda: (id(COUNT), length_hint(COUNT))),
    "deque": (queued, lambda: list(QUEUE)),
    "object": (of_an_object, lambda: OBJECT.own),
    "class": (of_a_class, lambda: Holder.calls),
    "module": (of_a_module, lambda: CONFIG.calls),
    "defaults": (by_default, lambda: (by_default.__defaults__[0][0], by_default.__kwdefaults__["counts"]["n"])),  # type: ignore[index]
    "iterator as a default": (iterated, lambda: length_hint(iterated.__defaults__[0])),  # type: ignore[index]
    "attribute of a function": (attributed, lambda: getattr(attributed, "calls", None)),
    "closure": enclosing(),
    "tensor": no_number(),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_a_module_counts_outside_is_as_it_was_and_counts_on(name: str) -> None:
    step, read = OUTSIDE[name]
    before, model = read(), Net(Part(step)).double()
    net = detachnet.make_detachable(model, ["stem"], SIZE)
    assert read() == before
    assert net.plan.whole.keys() == {"part"}
    outside, images = Outside(model), torch.randn(2, *SIZE, dtype=torch.double)
    found = []
    for run in (model, net):
        with outside.kept():
            found.append([run(images).detach() for _ in range(3)])
    assert read() == before
    assert not torch.equal(found[0][0], found[0][1])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", OUTSIDE)
def test_in_the_models_own_forward_it_is_refused_and_as_it_was(name: str) -> None:
    step, read = OUTSIDE[name]
    before = read()
    with pytest.raises(detachnet.TraceError, match=r"others in a later pass[\s\S]*module of its own"):
        detachnet.make_detachable(Root(step), ["stem"], SIZE)
    assert read() == before
    trace(Root(step), SIZE)
    assert read() == before


def of_an_array(numbers: Any) -> float:
    numbers[0] += 1
    return 1 + 0.1 * float(numbers[0])


def moved(numbers: "OrderedDict[float, None]") -> float:
    numbers.move_to_end(next(iter(numbers)))
    return next(iter(numbers))


HELD: dict[str, Callable[[], Step]] = {
    "method": lambda: Holder().step,
    "slot": lambda: Holder().step_slot,
    "method of a list": lambda: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].pop,
    "bytes": lambda: partial(of_an_array, bytearray(2)),
    "array": lambda: partial(of_an_array, array("d", [0.0])),
    "order": lambda: partial(moved, OrderedDict.fromkeys([1.0, 2.0, 3.0])),
    "iterator": lambda: partial(next, iter([1.0, 2.0, 3.0, 4.0])),
}


@pytest.mark.parametrize("name", HELD)
def test_what_a_module_counts_in_what_it_holds(name: str) -> None:
    model = Net(Part(HELD[name]())).double()
    net = detachnet.make_detachable(model, ["stem"], SIZE)
    assert net.plan.whole.keys() == {"part"}
    outside, images, found = Outside(model), torch.randn(2, *SIZE, dtype=torch.double), []
    for run in (model, net):
        with outside.kept():
            found.append([run(images).detach() for _ in range(3)])
    assert not torch.equal(found[0][0], found[0][1])
    torch.testing.assert_close(found[1], found[0])


def generated() -> Any:
    yield from range(1, 1000)


GENERATOR = generated()


def test_what_cannot_be_copied_or_taken_back_is_refused() -> None:
    for held in (partial(next, generated()), partial(float, queue.SimpleQueue())):
        with pytest.raises(
            detachnet.TraceError, match=r"cannot copy Net: its 'part\.step' \([\s\S]*global variable"
        ):
            detachnet.make_detachable(Net(Part(held)), ["stem"], SIZE)
    with pytest.raises(detachnet.TraceError, match=r"'GENERATOR' outside of it is a generator[\s\S]*iter\(range"):
        detachnet.make_detachable(Net(Part(lambda: next(GENERATOR))), ["stem"], SIZE)
    assert next(GENERATOR) == 1
