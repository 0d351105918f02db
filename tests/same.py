"""Whether a family is its network, and joint passes are separate ones, by rules that are not the library's.

Outputs, gradients, weights and buffers of training passes and one in evaluation mode are compared: of the network,
of the base-model in a family of it, of joint passes and of separate ones. Random numbers are replaced by fixed
ones: what a trace has baked in then shows, whatever the order in which it would draw.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import detachnet
from detachnet.surgery.turns import Turns

DRAWS = (0.3, 0.7)
"""What stands for random numbers; decisions by a half fall either way."""
DRAWN = (
    *("bernoulli", "bernoulli_", "normal", "normal_", "rand", "rand_like", "randint", "randint_like", "randn"),
    *("randn_like", "random_", "randperm", "uniform_", "exponential_", "native_dropout"),
)
"""Operations of torch that draw random numbers."""
_TOLD = r"the family does without|in another order|all models share|does not run the hooks"
_TOLD_JOINT = rf"{_TOLD}|the model gives other outputs each time"
"""Sentences of a plan that tell of a difference; of one between joint and separate passes."""
Result = dict[str, Tensor]
Passes = Callable[[Any, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Rules:
    """How networks are compared.

    Attributes:
        size: Shape of one image, `(C, H, W)`.
        bound: Relative difference that rounding explains.
        draws: What stands for random numbers, one comparison each.
        images: Images of a batch.
        modes: What is run, one after another: True is a training pass.
        patches: Network, draw → patches of what else it draws random numbers from.
        reset: Puts back what a network counts outside of itself.
    """

    size: tuple[int, ...]
    bound: float = 1e-6
    draws: Sequence[float] = DRAWS[:1]
    images: int = 4
    modes: Sequence[bool] = (True, True, False)
    patches: Callable[[nn.Module, float], list[Any]] = lambda net, draw: []
    reset: Callable[[nn.Module], None] = lambda net: None


class _Fixed(TorchDispatchMode):
    """Random numbers of torch are fixed ones."""

    def __init__(self, draw: float) -> None:
        super().__init__()
        self.draw = draw

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name not in DRAWN:
            return func(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            out = func(*args, **kwargs)
        if name == "randperm":
            fixed = torch.arange(len(out)).flip(0) if self.draw < 0.5 else torch.arange(len(out)).roll(1)
            return out.copy_(fixed)
        if "bernoulli" in name:
            p = args[1] if len(args) > 1 else args[0] if name == "bernoulli" else 0.5
            return out.copy_((torch.as_tensor(p, dtype=out.dtype) > self.draw).expand_as(out))
        if "randint" in name:
            low, high = (args[0], args[1]) if len(args) > 2 else (0, args[0])
            return out.fill_(int(low + self.draw * (high - low)))
        return out.fill_(self.draw)


class FixedGenerator:
    """Stands for an object that draws random numbers."""

    def __init__(self, draw: float) -> None:
        self.draw = draw

    def random(self) -> float:
        return self.draw


@contextmanager
def fixed(draw: float, patches: Sequence[Any] = ()) -> Iterator[None]:
    """All random numbers are one number."""
    names = {
        (random, "random"): lambda: draw,
        (random, "uniform"): lambda low, high: low + draw * (high - low),
        (random, "choice"): lambda of: of[int(draw * len(of))],
        (random, "sample"): lambda of, n: list(of)[::-1] if draw < 0.5 else list(of)[1:] + list(of)[:1],
        (np.random, "rand"): lambda: draw,
        (np.random, "uniform"): lambda low, high: low + draw * (high - low),
        (np.random, "permutation"): lambda n: (
            np.arange(n)[::-1].copy() if draw < 0.5 else np.roll(np.arange(n), 1)
        ),
    }
    every = [mock.patch.object(owner, name, replaced) for (owner, name), replaced in names.items()]
    with ExitStack() as stack:
        for patch in (*every, *patches):
            stack.enter_context(patch)
        stack.enter_context(_Fixed(draw))
        yield


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a network returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


def alone(model: Any, images: Tensor) -> dict[str, Any]:
    """A model's own output."""
    return {"": model(images.clone())}


def of_the_base(net: Any, images: Tensor) -> dict[str, Any]:
    """The base-model's output."""
    return {"": net(images.clone(), which="base")}


def jointly(net: Any, images: Tensor) -> dict[str, Any]:
    """All models in one pass."""
    outputs: dict[str, Any] = net(images.clone(), which="all")
    return outputs


def in_turn(net: Any, images: Tensor) -> dict[str, Any]:
    """Each model alone, as a joint pass has them."""
    outputs, turns = {}, Turns(net, net.names)
    for name in net.names:
        with turns.of(name):
            outputs[name] = net(images.clone(), which=name)
    return outputs


def steps(net: nn.Module, passes: Passes, draw: float, rules: Rules) -> Result:
    """Outputs, gradients, weights and buffers of some passes."""
    found: Result = {}
    rules.reset(net)
    for i, training in enumerate(rules.modes):
        net.train(training)
        generator = torch.Generator().manual_seed(i)
        images = torch.randn(rules.images, *rules.size, dtype=torch.double, generator=generator)
        with fixed(draw, rules.patches(net, draw)), torch.set_grad_enabled(training):
            made = {f"{n}.{k}": t for n, v in passes(net, images).items() for k, t in enumerate(tensors(v))}
            floating = [out for out in made.values() if out.is_floating_point()]
            terms = [(out * (torch.arange(out.numel()).view_as(out) % 7 - 3)).sum() for out in floating]
            if training and terms and sum(terms).requires_grad:  # type: ignore[union-attr]
                sum(terms).backward()  # type: ignore[union-attr]  # a backward pass may draw, too
        found |= {f"output {i} {name}": out.detach() for name, out in made.items()}
    found |= {f"gradient {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    found |= {f"value {n}": p.detach().clone() for n, p in net.named_parameters()}
    found |= {f"buffer {n}": b.clone() for n, b in net.named_buffers(remove_duplicate=False)}
    return found


def unlike(one: Result, two: Result, bound: float) -> str:
    """The first thing that is not the same; empty if nothing is."""
    largest = max((float(v.abs().max()) for n, v in one.items() if n.startswith("gradient")), default=0.0)
    for name in [*one, *(name for name in two if name not in one)]:
        a, b = one.get(name), two.get(name)
        if a is None or b is None:
            there = b if a is None else a
            if name.startswith("gradient") and there is not None and not there.any():
                continue
            return f"{name} is missing"
        if a.shape != b.shape:
            return f"{name} has another shape"
        if not a.numel() or not a.is_floating_point():
            if not torch.equal(a, b):
                return name
            continue
        scale = max(float(a.abs().nan_to_num().max()), 0.01 * largest if name.startswith("gradient") else 0, 1e-9)
        if not torch.allclose(a, b, rtol=bound, atol=bound * scale, equal_nan=True):
            return name
    return ""


def of_base(found: Result) -> Result:
    """What concerns the base-model in a family, by the model's names."""
    ours = {}
    for name, value in found.items():
        kind, _, rest = name.partition(" ")
        if kind == "output":
            ours[name] = value
        elif rest.startswith("base."):
            ours[f"{kind} {rest.removeprefix('base.')}"] = value
    return ours


def prepare(net: detachnet.DetachableNet) -> None:
    """Write all passes, so that none is written while random numbers are fixed."""
    for training in (True, False):
        net.train(training)
        for models in (*((name,) for name in net.names), net.names):
            net.prepare(models)


_TORCHS = ("_modules", "_parameters", "_buffers", *(name for name in vars(nn.Module()) if "hooks" in name))


@contextmanager
def as_new(net: nn.Module) -> Iterator[nn.Module]:
    """A network that is afterwards as before, plain attributes too; a copy of a family would be traced again."""
    parts = [part for part in net.modules() if not type(part).__module__.startswith(("detachnet.", "torch.jit."))]
    listed = {
        id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]
    }  # as recurrent layers list them
    plain = [
        (vars(p), copy.deepcopy({k: v for k, v in vars(p).items() if k not in _TORCHS}, dict(listed)))
        for p in parts
    ]
    held = [(m._buffers, dict(m._buffers)) for m in net.modules() if isinstance(m._buffers, dict)]
    values = [(t, t.detach().clone()) for t in [*net.parameters(), *net.buffers()]]
    try:
        yield net
    finally:
        for own, kept in [*plain, *held]:
            for name in [name for name in own if name not in kept and name not in _TORCHS]:
                del own[name]
            own.update(kept)
        for tensor, value in values:
            tensor.data.copy_(value)
        net.zero_grad()


def compared(pristine: nn.Module, net: detachnet.DetachableNet, rules: Rules) -> str:
    """How a family differs from its model, or joint passes from separate ones; empty if in nothing."""
    prepare(net)
    for draw in rules.draws:
        model = steps(copy.deepcopy(pristine), alone, draw, rules)
        found = []
        for way in (of_the_base, jointly, in_turn):
            with as_new(net):
                found.append(steps(net, way, draw, rules))
        base, joint, apart = found
        if difference := unlike(model, of_base(base), rules.bound):
            return f"base: {difference} at {draw}"
        if difference := unlike(apart, joint, rules.bound):
            return f"joint: {difference} at {draw}"
    return ""


def is_told(difference: str, plan: detachnet.DetachPlan) -> bool:
    """Whether the plan of a family says that it differs so."""
    known = _TOLD_JOINT if difference.startswith("joint") else _TOLD
    return any(re.search(known, line) for line in (*plan.hints, plan.checked))
