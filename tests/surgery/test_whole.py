"""What a trace would lose is kept: as a layer kept whole, as an operation of the graph, or it is refused."""

import copy
import cProfile
import itertools
import logging
import os
import pickle
import random
import re
import sys
import threading
from collections.abc import Callable
from os import getenv
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import detachnet
from detachnet.surgery.contents import parts_of
from detachnet.surgery.generators import generators_of
from detachnet.surgery.listening import _REPLACED
from detachnet.surgery.plan import DetachPlan
from detachnet.surgery.proof import _is_plain
from detachnet.surgery.trace import trace
from detachnet.surgery.whole import hooked
from tests import models
from tests.helpers import assert_joint_equals_separate

pytestmark = pytest.mark.slow

Run = Callable[[Any, Tensor], Tensor]
SIZE = (3, 16, 16)


class Stem(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())


class Meter:
    """A plain object that counts."""

    def __init__(self) -> None:
        self.count = 0


def own_draws() -> dict[str, Any]:
    return {"python": [random.Random(3)], "numpy": np.random.default_rng(3)}


def own_state() -> dict[str, Any]:
    """What passes may leave for later ones."""
    place = {"mean": torch.zeros(())}
    return {
        "last": None,
        "bank": [],
        "place": place,
        "factors": itertools.count(1),
        "array": np.zeros(1),
        **loose(),
    }


def loose() -> dict[str, Any]:
    """Weights of an architecture, as searches keep them."""
    return {"weights": [torch.ones(2, requires_grad=True)]}


class Block(nn.Module):
    """A module with children, so that it is opened."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.conv, self.norm, self.run = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), run
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.steps, self.average = 0, torch.zeros(8, 1, 1)
        self.seen, self.meter, self.draws = list[int](), Meter(), own_draws()
        vars(self).update(own_state())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Net(nn.Module):
    """Four layers around a part that a trace may lose."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.middle = Stem(), nn.Conv2d(8, 8, 3, 1, 1), middle
        self.c, self.fc = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.c(self.middle(self.b(self.a(x)))).mean((2, 3)))


class Root(Net):
    """The same part in the model's own forward."""

    def __init__(self, run: Run) -> None:
        super().__init__(nn.Identity())
        self.conv, self.norm, self.run = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), run
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.steps, self.average = 0, torch.zeros(8, 1, 1)
        self.seen, self.meter, self.draws = list[int](), Meter(), own_draws()
        vars(self).update(own_state())

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.c(self.run(self, self.b(self.a(x)))).mean((2, 3)))


def assert_is_the_model(model: nn.Module, net: detachnet.DetachableNet, seed: int = 5) -> None:
    """Two training passes and one in evaluation mode of the model and of the base-model."""
    alone, family = copy.deepcopy(model).double(), copy.deepcopy(net).double()
    torch.manual_seed(seed)
    images = torch.randn(4, *SIZE, dtype=torch.double)
    made = []
    for run in (alone, family):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        run.train()
        outputs = [run(images.clone()), run(images.clone())]
        sum(out.square().sum() for out in outputs).backward()
        run.eval()
        made.append([*outputs, run(images.clone())])
    for one, two in zip(*made, strict=True):
        torch.testing.assert_close(one, two)
    for (name, one), (_, two) in zip(alone.named_parameters(), family.base.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None and two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)
    for (name, one), (_, two) in zip(alone.named_buffers(), family.base.named_buffers(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def assert_nothing_stays() -> None:
    """No patch outlives a trace."""
    for owner, name, _ in _REPLACED:
        now = vars(owner).get(name)
        assert not getattr(now, "__module__", "").startswith("detachnet"), name
        assert "listening" not in repr(now)
    assert torch.is_grad_enabled()
    detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), check="none")


# Contexts, and functions that vanish.


def without_gradients(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h: Tensor = module.norm(module.conv(x))
    return h + x


@torch.inference_mode()
def in_inference_mode(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x)
    return h


def inferred(module: Any, x: Tensor) -> Tensor:
    return x + in_inference_mode(module, x).mean()


def switched_off(module: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    scale = module.conv(x).mean()
    torch.set_grad_enabled(True)
    return x * scale


def in_half_precision(module: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h: Tensor = module.conv(x)
    return h.to(x.dtype)


def in_full_precision(module: Any, x: Tensor) -> Tensor:
    with torch.autocast(device_type=x.device.type, enabled=False):
        h: Tensor = module.conv(x)
    return h


def saved_on_cpu(module: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        h: Tensor = module.conv(x)
    return h


def checkpointed(module: Any, x: Tensor) -> Tensor:
    h: Tensor = checkpoint(module.conv, x, use_reentrant=False)
    return h


def checkpointed_anew(module: Any, x: Tensor) -> Tensor:
    h: Tensor = checkpoint(lambda y: module.conv(y).relu(), x, use_reentrant=True)
    return h


# Decisions made once.


def layer_drop(module: Any, x: Tensor) -> Tensor:
    return x if module.training and random.random() < 0.5 else x + module.conv(x)


def numpy_noise(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * float(np.random.uniform(0.5, 1))
    return h


def own_python(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * module.draws["python"][0].random()
    return h


def own_numpy(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x if module.draws["numpy"].random() < 0.5 else x * 2)
    return h


def left_in_a_list(module: Any, x: Tensor) -> Tensor:
    module.seen.append(1)
    h: Tensor = module.conv(x) * len(module.seen)
    return h


def left_in_an_object(module: Any, x: Tensor) -> Tensor:
    module.meter.count += 1
    h: Tensor = module.conv(x) * module.meter.count
    return h


def left_in_itself(module: Any, x: Tensor) -> Tensor:
    vars(module)["steps"] += 1
    h: Tensor = module.conv(x) * module.steps
    return h


def number_taken_out(module: Any, x: Tensor) -> Tensor:
    i = int(torch.randint(0, 8, (1,)).item())
    h: Tensor = module.conv(x) + x[:, i : i + 1]
    return h


def drawn_outside(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * torch.empty(1).uniform_().to(x)
    return h


def by_device(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x * 10 if x.device.type == "cpu" else x)
    return h


def by_place(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x if x.is_cuda else x * 10)
    return h


def by_gradient(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x * 10 if x.requires_grad else x)
    return h


def by_history(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x * 10 if x.grad_fn is None else x)
    return h


def by_dtype(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if x.dtype == torch.float64 else 1)
    return h


def by_identity(module: Any, x: Tensor) -> Tensor:
    given = x.dtype
    h: Tensor = module.conv(x) * (2 if torch.float64 is given else 1)
    return h


def by_lookup(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * GAINS.get(x.dtype, 1)
    return h


GAINS = {torch.float64: 2}


def by_layout(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if x.is_contiguous(memory_format=torch.channels_last) else 1)
    return h


def by_stride(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if x.stride(1) == 1 else 1)
    return h


def by_what_is_frozen(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (1 if any(p.requires_grad for p in module.parameters()) else 2)
    return h


def weighed(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * module.weights[0].softmax(0)[0]
    return h


# State.


def assigned(module: Any, x: Tensor) -> Tensor:
    if module.training:
        module.mean = 0.9 * module.mean + 0.1 * x.detach().mean((0, 2, 3))[:, None, None].float()
    h: Tensor = module.conv(x - module.mean)
    return h


def in_place(module: Any, x: Tensor) -> Tensor:
    if module.training:
        module.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3))[:, None, None])
    h: Tensor = module.conv(x - module.mean)
    return h


def replaced(module: Any, x: Tensor) -> Tensor:
    if module.training:
        module.mean.data = module.mean + x.detach().mean((0, 2, 3))[:, None, None]
    h: Tensor = module.conv(x - module.mean)
    return h


def averaged(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) - module.average.to(x)
    module.average = 0.5 * module.average + 0.5 * x.detach().mean((0, 2, 3))[:, None, None].float()
    return h


def counted(module: Any, x: Tensor) -> Tensor:
    module.steps += 1
    h: Tensor = module.conv(x) * module.steps
    return h


def kept_for_the_next(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) if module.last is None else module.conv(x) + module.last
    module.last = h.detach().mean()
    return h


def first_pass_only(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x if module.last else x * 10)
    module.last = True
    return h


def kept_in_a_list(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) + sum(module.bank[-2:])
    module.bank.append(h.detach().mean())
    return h


def kept_in_a_place(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) + module.place["mean"]
    module.place["mean"] = h.detach().mean()
    return h


def given_one_by_one(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * next(module.factors)
    return h


def in_an_array(module: Any, x: Tensor) -> Tensor:
    module.array += 1
    h: Tensor = module.conv(x) * float(module.array[0])
    return h


def seeded_anew(module: Any, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    h: Tensor = module.conv(x) + torch.randn(1, 8, 1, 1, generator=generator).to(x)
    return h


def on_the_device_of_a_weight(module: Any, x: Tensor) -> Tensor:
    place = next(module.conv.parameters()).device
    h: Tensor = module.conv(x.to(place)) + torch.ones(8, 1, 1, device=place)
    return h


def by_autocast(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if torch.is_autocast_enabled("cpu") else 1)
    return h


def by_gradients(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (1 if torch.is_grad_enabled() else 2)
    return h


def by_inference(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if torch.is_inference_mode_enabled() else 1)
    return h


def by_processes(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    return h


def by_export(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if torch.onnx.is_in_onnx_export() else 1)
    return h


def by_dtype_of_autocast(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if torch.get_autocast_dtype("cpu") == torch.float16 else 1)
    return h


def by_dtype_by_default(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if torch.get_default_dtype() == torch.float64 else 1)
    return h


def by_determinism(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if torch.are_deterministic_algorithms_enabled() else 1)
    return h


def by_threads(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * torch.get_num_threads()
    return h


def by_flag(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if torch.backends.cudnn.benchmark else 1)
    return h


def by_flag_of_matrices(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if torch.backends.cuda.matmul.allow_tf32 else 1)
    return h


KEPT: dict[Run, str] = {
    without_gradients: "no_grad",
    inferred: "no_grad",
    switched_off: "no_grad",
    in_half_precision: "autocast",
    in_full_precision: "autocast",
    saved_on_cpu: "save_on_cpu or checkpointing",
    checkpointed: "save_on_cpu or checkpointing",
    checkpointed_anew: "checkpointing",
    layer_drop: "Python's random numbers",
    numpy_noise: "NumPy's random numbers",
    drawn_outside: "random numbers outside the graph",
    own_python: "random numbers of its own",
    own_numpy: "random numbers of its own",
    number_taken_out: ".item() of a tensor",
    left_in_a_list: "what is left in 'seen'",
    left_in_an_object: "what is left in 'meter'",
    left_in_itself: "'steps' changed",
    by_device: "a decision by .device",
    by_place: "a question about .is_cuda",
    by_gradient: "a question about .requires_grad",
    by_history: "a question about .grad_fn",
    by_dtype: "a decision by .dtype",
    by_identity: "a decision by what .dtype is, not by ==",
    by_lookup: "a decision by what .dtype is, not by ==",
    by_layout: "a decision by .is_contiguous",
    by_stride: "a decision by .stride",
    by_what_is_frozen: "a question about .requires_grad",
    weighed: "a tensor that takes a gradient and is no nn.Parameter",
    assigned: "'mean' assigned",
    in_place: "'mean' changed in place",
    replaced: ".data of a tensor assigned",
    averaged: "'average' assigned",
    counted: "'steps' changed",
    kept_for_the_next: "what is left in 'last'",
    first_pass_only: "what is left in 'last'",
    kept_in_a_list: "what is left in 'bank'",
    kept_in_a_place: "what is left in 'place'",
    given_one_by_one: "what is left in 'factors'",
    in_an_array: "what is left in 'array'",
    seeded_anew: "random numbers of its own",
    on_the_device_of_a_weight: "a question about the device of a weight",
    by_autocast: "a question about is_autocast_enabled",
    by_gradients: "a question about is_grad_enabled",
    by_inference: "a question about is_inference_mode_enabled",
    by_processes: "a question about is_initialized",
    by_export: "a question about is_in_onnx_export",
    by_dtype_of_autocast: "a question about get_autocast_dtype",
    by_dtype_by_default: "a question about get_default_dtype",
    by_determinism: "a question about are_deterministic_algorithms_enabled",
    by_threads: "a question about get_num_threads",
    by_flag: "a question about a flag of torch.backends",
    by_flag_of_matrices: "a question about a flag of torch.backends",
}
"""What a module's own forward may do, and how the plan says that it is kept whole for it."""


REFUSED = {
    *(in_half_precision, layer_drop, numpy_noise, drawn_outside, by_device, by_place, by_gradient, by_history),
    *(assigned, in_place, replaced, averaged, own_python, own_numpy, number_taken_out, by_what_is_frozen, weighed),
    *(counted, left_in_a_list, left_in_an_object, left_in_itself, given_one_by_one, in_an_array, seeded_anew),
    *(
        by_autocast,
        by_gradients,
        by_inference,
        by_processes,
        kept_in_a_list,
        on_the_device_of_a_weight,
        by_identity,
        by_lookup,
    ),
    *(by_export, by_dtype_of_autocast, by_dtype_by_default, by_determinism, by_threads),
    *(by_flag, by_flag_of_matrices),
}
"""What is refused in the model's own forward, which cannot be kept whole."""
LATER = {kept_for_the_next, first_pass_only, kept_in_a_place}
"""What is refused there because a second pass is another."""
TOLD = {saved_on_cpu, checkpointed, checkpointed_anew, by_layout, by_stride}
"""What is left out there, and told in a hint."""


def name_of(run: Run) -> str:
    return run.__name__


@pytest.mark.parametrize("run", KEPT, ids=name_of)
def test_the_smallest_module_around_is_kept_whole(run: Run) -> None:
    model = Net(nn.Sequential(nn.ReLU(), Block(run)))
    states = random.getstate(), torch.get_rng_state()
    net = detachnet.make_detachable(model, ["a", "c"], SIZE)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert net.plan.whole.keys() == {"middle.1"}
    assert net.plan.whole["middle.1"].startswith(f"{KEPT[run]}")
    assert "test_whole.py:" in net.plan.whole["middle.1"]
    assert f"kept whole: 'middle.1' ({KEPT[run]} at test_whole.py:" in str(net.plan)
    assert DetachPlan.model_validate_json(net.plan.model_dump_json()) == net.plan
    assert_is_the_model(model, net)
    assert "norms.sub0.middle.1.norm.running_mean" in net.state_dict()  # its norm is private all the same
    assert_nothing_stays()


@pytest.mark.parametrize("run", KEPT, ids=name_of)
def test_in_the_models_own_forward_it_is_right_or_refused_with_its_line(run: Run) -> None:
    model = Root(run)
    if run in LATER:
        with pytest.raises(detachnet.TraceError, match=r"others in a later pass[\s\S]*try .*module of its own"):
            detachnet.make_detachable(model, ["a", "c"], SIZE)
    elif run in REFUSED:
        with pytest.raises(
            detachnet.TraceError,
            match=rf"{re.escape(KEPT[run])}[\s\S]*where .*test_whole\.py:\d+: [\s\S]*try .*module of its own",
        ):
            detachnet.make_detachable(model, ["a", "c"], SIZE)
    else:
        net = detachnet.make_detachable(model, ["a", "c"], SIZE)
        said = [hint for hint in net.plan.hints if "the family does without" in hint]
        assert len(said) == (run in TOLD)
        if run in TOLD:
            assert f"{KEPT[run]} at test_whole.py:" in said[0]
        assert_is_the_model(model, net)
    assert_nothing_stays()


OUTSIDE, CALLS = np.random.default_rng(3), {"forward": 0}


class Outside(Net):
    """Draws from a global object, and counts in another, in a part with children."""

    class Part(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            CALLS["forward"] += 1
            return super().forward(x) * OUTSIDE.uniform(0.5, 1)

    def __init__(self) -> None:
        super().__init__(nn.Sequential(Outside.Part(nn.Conv2d(8, 8, 1))))


def test_variables_outside_of_a_model_count_and_are_left_as_they_are() -> None:
    state = OUTSIDE.bit_generator.state
    net = detachnet.make_detachable(Outside(), ["a"], SIZE)
    assert net.plan.whole.keys() == {"middle.0"}
    assert OUTSIDE.bit_generator.state == state
    images = torch.randn(2, *SIZE)
    assert not torch.equal(net.eval()(images), net(images))


def registered(module: Any, x: Tensor) -> Tensor:
    module.register_buffer("mean", module.mean + 1)
    return x + module.mean


class Registering(nn.Module):
    """Registers a buffer anew at each pass, in a layer without children."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return registered(self, x)


def test_a_layer_that_registers_a_buffer() -> None:
    for cuts in (["a"], {"half": detachnet.SubModel(width=0.5)}):
        model = Net(Registering())
        net = detachnet.make_detachable(model, cuts, SIZE)
        assert_is_the_model(model, net)
        assert all(isinstance(buffer, Tensor) for buffer in net.traced(True).root.buffers())
    net = detachnet.make_detachable(Net(Block(registered)), ["a"], SIZE)
    assert net.plan.whole["middle"].startswith("'mean' assigned at test_whole.py:")


def test_weights_changed_in_place_are_kept_in_their_module() -> None:
    def masked(module: Any, x: Tensor) -> Tensor:
        weight = module.conv.weight * 1
        weight[:, :4] = 0
        return F.conv2d(x, weight, padding=1)

    model = Net(nn.Sequential(Block(masked)))
    net = detachnet.make_detachable(model, ["a"], SIZE)
    assert net.plan.whole == {"middle.0": "it changes weights in place"}
    assert_is_the_model(model, net)


def test_cuts_inside_of_a_module_with_hooks_are_listed() -> None:
    model = Net(Block(lambda m, x: m.conv(x)))
    model.middle.register_forward_hook(lambda *_: None)
    names = [point.name for point in detachnet.find_cuts(model, SIZE)]
    assert "middle.conv" in names or "middle" in names
    assert detachnet.make_detachable(model, [names[-3]], SIZE).names == ("base", "sub0")


# Functions with a backward of their own, and script functions, are operations of the graph.


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Halves(torch.autograd.Function):
    """Two outputs, an argument that is a number, and a context of its own."""

    @staticmethod
    def forward(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        one, two = x.chunk(2, 1)
        return one * scale, two.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, one: Tensor, two: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.cat([one * ctx.scale, -two], 1), None


class Clipped(torch.autograd.Function):
    """Saves what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor) -> Tensor:
        ctx.save_for_backward(x, low)
        return torch.maximum(x, low)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, low = ctx.saved_tensors
        return gradient * (x > low) * 0.5, None


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@torch.jit.script
def mixed(x: Tensor, share: float) -> Tensor:
    return x * share + x.relu() * (1.0 - share)


@torch.jit.script
def by_value(x: Tensor) -> Tensor:
    if bool((x.abs().sum() >= 0).item()):
        x = x * 2
    return x


FUNCTIONS: dict[str, Run] = {
    "reverse": lambda m, x: models.Reverse.apply(m.conv(x)),  # type: ignore[no-untyped-call]
    "sign": lambda m, x: Sign.apply(m.conv(x)) * x,  # type: ignore[no-untyped-call]
    "halves": lambda m, x: torch.cat(Halves.apply(m.conv(x), 3.0), 1),  # type: ignore[no-untyped-call]
    "clipped": lambda m, x: Clipped.apply(m.conv(x), m.mean),  # type: ignore[no-untyped-call]
    "swish": lambda m, x: swish(m.conv(x)),
    "mixed": lambda m, x: mixed(m.conv(x), 0.25),
    "by value": lambda m, x: by_value(m.conv(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_operations_of_the_graph(name: str) -> None:
    model = Root(FUNCTIONS[name])
    net = detachnet.make_detachable(model, ["a", "b"], SIZE)
    assert net.plan.whole == {}
    assert_is_the_model(model, net)
    assert_joint_equals_separate(copy.deepcopy(net).double(), torch.randn(4, *SIZE, dtype=torch.double))
    images = torch.randn(2, *SIZE)
    alone = pickle.loads(pickle.dumps(net.detach("sub0")))
    torch.testing.assert_close(alone(images), net.eval()(images, which="sub0"))
    assert_nothing_stays()


def test_script_functions_may_be_named_as_leaves() -> None:
    model = Root(FUNCTIONS["swish"])
    net = detachnet.make_detachable(model, ["a"], SIZE, leaf_functions=[swish])
    assert_is_the_model(model, copy.deepcopy(net))
    assert [p.name for p in detachnet.find_cuts(model, SIZE, leaf_functions=[swish])][-2:] == ["c", "mean"]


reverse = models.Reverse.apply


def test_an_apply_bound_before_the_trace_is_kept_whole_or_refused() -> None:
    def run(module: Any, x: Tensor) -> Tensor:
        h: Tensor = reverse(module.conv(x))  # type: ignore[no-untyped-call]
        return h

    model = Net(Block(run))
    net = detachnet.make_detachable(model, ["a"], SIZE)
    assert list(net.plan.whole) == ["middle"]
    assert_is_the_model(model, net)
    with pytest.raises(detachnet.TraceError, match="the traced Root is not the model"):
        detachnet.make_detachable(Root(run), ["a"], SIZE)


# Hooks.


def test_a_container_with_hooks_is_kept_whole_and_runs_them() -> None:
    def tenfold(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out * 10

    for register in (
        lambda m: m.register_forward_hook(tenfold),
        lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] / 255,)),
        lambda m: m.register_full_backward_hook(lambda _, given, __: (given[0] * 2,)),
    ):
        model = Net(Block(lambda m, x: m.conv(x)))
        handle = register(model.middle)
        net = detachnet.make_detachable(model, ["a"], SIZE)
        assert "hook from test_whole.py:" in net.plan.whole["middle"]
        images, both = torch.randn(2, *SIZE), []
        for run in (model.train(), net.train()):
            out = run(images)
            out.sum().backward()
            both.append((out, (run.base if run is net else run).a[0].weight.grad))  # type: ignore[union-attr]
        torch.testing.assert_close(both[1], both[0])
        opened = detachnet.make_detachable(model, ["middle.conv"], SIZE).plan
        assert opened.whole == {}
        assert opened.hints == ("the family does not run the hooks of 'middle'",)
        handle.remove()
        assert detachnet.make_detachable(model, ["middle.conv"], SIZE).plan.whole == {}


@pytest.mark.filterwarnings("ignore")  # torch.ao says of itself that it is deprecated
def test_hooks_of_torchs_that_give_something_are_run() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    middle = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()).train()
    middle.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = Net(quantization.prepare_qat(quantization.fuse_modules_qat(middle, [["0", "1", "2"]])))
    model(torch.randn(4, *SIZE))
    model.eval().apply(quantization.disable_observer)
    net = detachnet.make_detachable(model, ["a"], SIZE, check="none")
    assert net.plan.whole["middle.0"].startswith("a forward hook from ")
    images = torch.randn(2, *SIZE)
    torch.testing.assert_close(net(images), model(images))


def test_hooks_of_torchs_that_compute_weights_keep_nothing_whole() -> None:
    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.conv2d(x, self.weight))

    for compute in (nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)):
        assert hooked(compute(Weighed())) == {}


def test_fused_layers_are_no_containers() -> None:
    for plain in (Stem(), nn.ModuleList([nn.ReLU()]), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)):
        assert _is_plain(plain)
    for own in (Block(by_export), Fused(nn.Conv2d(1, 1, 1))):
        assert not _is_plain(own)


class Fused(nn.Sequential):
    """A container with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_cut_inside_of_what_is_kept_whole_is_refused_with_the_reason() -> None:
    with pytest.raises(
        detachnet.CutError,
        match=r"cannot cut Net at 'middle\.conv': 'middle' is kept whole \(no_grad at test_whole\.py:\d+\)"
        r"[\s\S]*try .*cut at 'middle'",
    ):
        detachnet.make_detachable(Net(Block(without_gradients)), ["middle.conv"], SIZE)
    plan = detachnet.make_detachable(Net(Block(checkpointed)), ["middle.conv"], SIZE).plan
    assert plan.hints[0].startswith("the family does without save_on_cpu or checkpointing at test_whole.py:")


def test_hooks_of_the_model_itself_are_named() -> None:
    model = Net(nn.Identity())
    model.register_forward_pre_hook(lambda _, args: (args[0] / 255,))
    net = detachnet.make_detachable(model, ["a"], SIZE)
    hint = "the family does not run the hooks of the model itself; what they change belongs into its forward"
    assert net.plan.hints == (hint,)


# Values with two names.


def slice_in_place(module: Any, x: Tensor) -> Tensor:
    h = module.conv(x)
    part = h[:, :4]
    part += 1.0
    return h  # type: ignore[no-any-return]


def piece_in_place(module: Any, x: Tensor) -> Tensor:
    h = module.conv(x)
    one, two = h.narrow(1, 0, 4), h.narrow(1, 4, 4)
    one *= 2
    one -= two
    return h  # type: ignore[no-any-return]


def shortcut_in_place(module: Any, x: Tensor) -> Tensor:
    h = module.conv(x)
    shortcut = h
    h += 1
    return module.norm(h) + shortcut  # type: ignore[no-any-return]


def flat_in_place(module: Any, x: Tensor) -> Tensor:
    h = module.conv(x)
    flat = h.view(h.shape[0], -1)
    flat /= 2
    flat += 1
    return h + flat.view_as(h)  # type: ignore[no-any-return]


def items_in_place(module: Any, x: Tensor) -> Tensor:
    h = module.conv(x) * 1
    h[:, 2:4] = 0.5
    h[:, :2] += 1
    return h  # type: ignore[no-any-return]


def number(module: Any, x: Tensor) -> Tensor:
    n = x.shape[1]
    n += 1
    n *= 2
    h: Tensor = module.conv(x) / n
    return h


@pytest.mark.parametrize(
    "run",
    [slice_in_place, piece_in_place, shortcut_in_place, flat_in_place, items_in_place, number],
    ids=name_of,
)
def test_values_with_two_names(run: Run) -> None:
    for model in (Root(run), Net(Block(run))):
        net = detachnet.make_detachable(model, ["a", "b"], SIZE)
        assert net.plan.whole == {}
        assert_is_the_model(model, net)
        assert_joint_equals_separate(net.double(), torch.randn(4, *SIZE, dtype=torch.double))


def test_an_assignment_of_a_value_with_one_name_stays_as_torch_fx_writes_it() -> None:
    def run(module: Any, x: Tensor) -> Tensor:
        h = module.norm(module.conv(x))
        h += x
        return h  # type: ignore[no-any-return]

    nodes = trace(Net(Block(run)), SIZE).eval.names
    assert "middle.add" in nodes
    assert nodes["middle.add"].target.__name__ == "add"  # type: ignore[union-attr]


class Prepared(Net):
    """Normalizes the image in place."""

    def __init__(self, prepare: Callable[[Tensor], Any]) -> None:
        super().__init__(nn.Identity())
        self.prepare = prepare

    def forward(self, x: Tensor) -> Any:
        self.prepare(x)
        return super().forward(x)


def each_channel(x: Tensor) -> None:
    for i in range(3):
        x[:, i].sub_(0.5)


def flattened(x: Tensor) -> None:
    flat = x.flatten(1)
    flat *= 2


def first_channel(x: Tensor) -> None:
    x[:, 0] = 0.0


@pytest.mark.parametrize("prepare", [each_channel, flattened, first_channel], ids=lambda run: run.__name__)
def test_an_image_changed_in_place_is_still_there_for_the_others(prepare: Callable[[Tensor], Any]) -> None:
    model = Prepared(prepare)
    net = detachnet.make_detachable(model, ["a", "b"], SIZE).eval()
    assert_is_the_model(model, net)
    images = torch.randn(4, *SIZE)
    apart = {name: net(images.clone(), which=name) for name in net.names}
    torch.testing.assert_close(net(images.clone(), which="all"), apart)


# A user's layer that works in place.


class InPlace(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Shortcut(Net):
    """Reads what the middle was given again, after it."""

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x))
        return self.fc((self.c(self.middle(h)) + h).mean((2, 3)))


@pytest.mark.parametrize("net_of", [Net, Shortcut])
@pytest.mark.parametrize(
    "run",
    [lambda x: F.leaky_relu(x, 0.1, inplace=True), lambda x: x.mul_(2).sigmoid_(), lambda x: x.clamp_(min=0)],
)
def test_layers_in_place_train_jointly(net_of: type[Net], run: Callable[[Tensor], Tensor]) -> None:
    model = net_of(InPlace(run))
    net = detachnet.make_detachable(model, ["a"], SIZE)
    assert_is_the_model(model, net)
    assert_joint_equals_separate(net.double(), torch.randn(4, *SIZE, dtype=torch.double))


# Numbers made from shapes, classes of values, inputs.


NUMBERS: dict[str, Run] = {
    "np.sqrt": lambda m, x: m.conv(x) / np.sqrt(x.shape[1]),
    "np.prod": lambda m, x: m.conv(x) / float(np.prod(list(x.shape[1:]))),
    "torch.tensor": lambda m, x: m.conv(x) / torch.tensor(x.shape[1]),
    "torch.as_tensor": lambda m, x: (
        m.conv(x) * torch.as_tensor([x.shape[2] / x.shape[3]] * 8).to(x)[:, None, None]
    ),
    "isinstance": lambda m, x: m.conv(x) if isinstance(x, Tensor) and isinstance(x.shape[1], int) else x,
    "is_tensor": lambda m, x: m.conv(sum([x] if torch.is_tensor(x) else x)),
    "len": lambda m, x: m.conv(x).view(len(x), 2 * len(x.shape), -1).view(x.shape),
    "isinstance of a tuple": lambda m, x: (
        m.conv(x.chunk(2, 1)[0].repeat(1, 2, 1, 1)) if isinstance(x.chunk(2, 1), tuple) else x
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_from_shapes_and_classes_of_values(name: str) -> None:
    model = Root(NUMBERS[name])
    net = detachnet.make_detachable(model, ["a", "b"], SIZE)
    assert net.plan.whole == {}
    assert_is_the_model(model, net)


class TwoInputs(Net):
    def forward(self, x: Tensor, meta: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x) + meta


class Keyword(Net):
    def forward(self, x: Tensor, *, scale: float) -> Any:  # type: ignore[override]
        return super().forward(x) * scale


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module, **rest: Any) -> None:
        super().__init__()
        self.net, self.rest = net, rest

    def forward(self, x: Tensor) -> Any:
        return self.net(x, **self.rest)


@pytest.mark.parametrize(("kind", "rest"), [(TwoInputs, {"meta": 1.0}), (Keyword, {"scale": 2.0})])
def test_a_model_takes_one_image(kind: type[Net], rest: dict[str, Any]) -> None:
    model, name = kind(nn.Identity()), next(iter(rest))
    with pytest.raises(
        detachnet.TraceError, match=rf"takes one image, but its forward takes x, {name}[\s\S]*wrap it"
    ):
        detachnet.make_detachable(model, ["a"], SIZE)
    detachnet.make_detachable(Wrapped(model, **rest), ["net.a"], SIZE)


class ByName(Net):
    def forward(self, *, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x)


def test_an_image_by_its_name() -> None:
    said = r"takes x by its name only[\s\S]*def forward\(self, x\): return self.net\(x=x\)"
    with pytest.raises(detachnet.TraceError, match=said):
        detachnet.make_detachable(ByName(nn.Identity()), ["a"], SIZE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"leaf_modules": [nn.ReLU()]}, r"ReLU\(\) cannot be kept whole"),
        ({"leaf_functions": ["x"]}, "'x' cannot be kept whole"),
        ({"leaf_modules": "middle"}, r"leaf_modules is a list, not 'middle'[\s\S]*leaf_modules=\['middle'\]"),
        ({"leaf_modules": nn.ReLU}, r"leaf_modules is a list, not ReLU[\s\S]*leaf_modules=\[ReLU\]"),
        ({"example_input": np.zeros((2, 3, 16, 16))}, "example_input is a batch of images, a tensor, not ndarray"),
    ],
)
def test_arguments_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(detachnet.TraceError, match=said):
        detachnet.make_detachable(Net(nn.Identity()), ["a"], SIZE, **options)


def test_lazy_layers_are_to_be_run_first() -> None:
    for lazy in (nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), lazy, nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        with pytest.raises(detachnet.TraceError, match=r"'1' has no shape yet[\s\S]*torch\.zeros\(2, 3, 16, 16\)"):
            detachnet.make_detachable(model, ["2"], SIZE)
        model(torch.zeros(2, *SIZE))
        detachnet.make_detachable(model, ["2"], SIZE)


@pytest.mark.parametrize("kept", [dict, list])
def test_activations_that_a_pass_has_left(kept: type) -> None:
    def run(module: Any, x: Tensor) -> Tensor:
        h = module.conv(x)
        if isinstance(module.left, dict):
            module.left["conv"] = {"out": [h]}
        else:
            module.left[:] = [h, (h, 1)]
        return h  # type: ignore[no-any-return]

    for model in (Root(run), Net(Block(run))):
        (model if isinstance(model, Root) else model.middle).left = kept()
        model(torch.randn(2, *SIZE))
        detachnet.make_detachable(model, ["a"], SIZE)


# Wrappers inside.


def test_what_is_inside_a_wrapper_can_be_cut() -> None:
    model = Net(nn.DataParallel(Block(lambda m, x: m.norm(m.conv(x)))))
    net = detachnet.make_detachable(model, ["middle.module.conv", "middle"], SIZE)
    assert net.base.state_dict().keys() == model.state_dict().keys()
    assert "norms.sub0.middle.module.norm.weight" in net.state_dict()
    assert_is_the_model(model, net)
    twice = Net(nn.Sequential(nn.DataParallel(nn.DataParallel(Block(lambda m, x: m.norm(m.conv(x)))))))
    assert_is_the_model(twice, detachnet.make_detachable(twice, ["middle.0.module.module.conv"], SIZE))
    compiled = Net(torch.compile(Block(lambda m, x: m.norm(m.conv(x))), backend="eager"))  # type: ignore[arg-type]
    assert "middle._orig_mod.conv" in [point.name for point in detachnet.find_cuts(compiled, SIZE)]


# What changes after the family was made.


def tempered(module: Any, x: Tensor) -> Tensor:
    h = F.dropout(module.conv(x), module.drop) if module.training and module.drop > 0 else module.conv(x)
    return (h if module.kind == "plain" else h.relu()) / module.temperature  # type: ignore[no-any-return]


def test_plain_attributes_are_followed(caplog: pytest.LogCaptureFixture) -> None:
    for model in (Root(tempered), Net(Block(tempered))):
        own = model if isinstance(model, Root) else model.middle
        own.drop, own.temperature, own.kind = 0.0, 1.0, "plain"
        net = detachnet.make_detachable(model, ["a"], SIZE)
        kept = net.base if isinstance(model, Root) else net.base.middle
        images = torch.randn(2, *SIZE)
        for change in ({"temperature": 4.0}, {"kind": "relu"}):
            vars(own).update(change)
            vars(kept).update(change)
            with caplog.at_level(logging.WARNING, logger="detachnet"):
                torch.testing.assert_close(net.eval()(images), model.eval()(images))
            assert f"is traced again: {next(iter(change))!r} was" in caplog.text
        vars(kept)["drop"] = 0.9
        net.train()
        assert not torch.equal(net(images, which="sub0"), net(images, which="sub0"))
        torch.testing.assert_close(copy.deepcopy(net).eval()(images), model.eval()(images))


SCALES = {"out": 1.0}


def outside_scale() -> float:
    return SCALES["out"]


def scheduled(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * module.options.scale * module.table["scale"][0] * outside_scale()
    return module.act(h if module.mask is None else h * module.mask)  # type: ignore[no-any-return]


def test_what_is_scheduled_in_objects_and_variables_is_followed() -> None:
    model = Net(Block(scheduled))
    own = model.middle
    vars(own).update(options=SimpleNamespace(scale=1.0), table={"scale": [1.0]}, mask=None, act=F.relu)
    net = detachnet.make_detachable(model, ["a"], SIZE, check="outputs").eval()
    images, kept = torch.randn(2, *SIZE), vars(net.base.middle)

    def same() -> bool:
        with torch.no_grad():
            return torch.allclose(net(images), net.base(images), atol=1e-5)

    passes = [same()]
    kept["options"].scale = 2.0
    passes.append(same())
    kept["table"]["scale"][0] = 3.0
    passes.append(same())
    kept["mask"] = torch.rand(8, 1, 1)
    passes.append(same())
    kept["mask"].mul_(2)
    passes.append(same())
    kept["act"] = torch.tanh
    passes.append(same())
    SCALES["out"] = 2.0
    passes.append(same())
    SCALES["out"] = 1.0
    assert passes == 7 * [True]


def by_batch(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if x.shape[0] > 100 else 1)
    return h


def cooled(module: Any, x: Tensor) -> Tensor:
    return x / module.temperature


class Reading(nn.Module):
    """Reads an attribute in one of the ways in which a forward pass may."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.way, self.temperature = nn.Conv2d(8, 8, 1), way, 1.0

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        ways = {
            "function": lambda: cooled(self, x),
            "method": lambda: self.cool(x),
            "property": lambda: x / self.heat,
        }
        return ways[self.way]() if self.way in ways else self.by_name(x)

    def cool(self, x: Tensor) -> Tensor:
        return x / self.temperature

    @property
    def heat(self) -> float:
        return self.temperature

    def by_name(self, x: Tensor) -> Any:
        return getattr(self, "co" + "ol")(x)


@pytest.mark.parametrize("way", ["function", "method", "property", "name"])
def test_what_a_forward_pass_reads_is_followed_by_whatever_way(way: str) -> None:
    net = detachnet.make_detachable(Net(Reading(way)), ["a"], SIZE, check="none").eval()
    images = torch.randn(2, *SIZE)
    before = net(images)
    net.base.middle.temperature = 4.0  # type: ignore[union-attr]
    assert torch.equal(net(images), net.base(images))
    assert not torch.equal(net(images), before)


def by_environment(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * float(os.environ.get("SCALE", "1"))
    return h


def by_getenv(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * float(getenv("SCALE") or 1)
    return h


@pytest.mark.parametrize("forward", [by_environment, by_getenv])
def test_the_environment_is_followed(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = detachnet.make_detachable(Net(Block(forward)), ["a"], SIZE, check="outputs").eval()
    images = torch.randn(2, *SIZE)
    before = net(images)
    monkeypatch.setenv("SCALE", "3")
    assert torch.equal(net(images), net.base(images))
    assert not torch.equal(net(images), before)


def test_what_no_forward_pass_names_is_not_looked_at_before_each() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.temperature, self.seen = nn.Conv2d(8, *CHANNELS["few"], 1), 1.0, [1]

        def forward(self, x: Tensor) -> Any:
            return self.cool(self.conv(x))

        def cool(self, x: Tensor) -> Tensor:
            return x / self.temperature

        def described(self) -> list[int]:
            return self.seen

    net = detachnet.make_detachable(Net(Plain()), ["a"], SIZE, check="none")
    looked_at = {reading.name for reading in [*net._derived.read._fixed, *net._derived.read._others]}
    assert "temperature" in looked_at
    assert not looked_at & {"seen", "CHANNELS"}


CHANNELS = {"few": [8]}


def test_what_decides_by_the_number_of_images_is_kept_whole() -> None:
    model = Net(Block(by_batch))
    net = detachnet.make_detachable(model, ["a"], SIZE)
    assert "a decision by the batch size" in net.plan.whole["middle"]
    assert_is_the_model(model, net)


def by_size(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (2 if x.shape[-1] > 8 else 1)
    return h


def test_the_base_model_takes_images_of_another_size_as_it_is() -> None:
    model = Root(by_size)
    net = detachnet.make_detachable(model, ["a"], SIZE).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(images), model.eval()(images))


# Names of modules, files, threads.


def test_single_modules_can_be_named() -> None:
    model = Net(nn.Sequential(Block(lambda m, x: m.conv(x)), Block(lambda m, x: m.conv(x))))
    net = detachnet.make_detachable(model, ["middle.0.conv"], SIZE, leaf_modules=["middle.1"])
    assert "middle.1.conv" not in [p.name for p in detachnet.find_cuts(model, SIZE, leaf_modules=["middle.1"])]
    assert "middle.1.conv" not in net.traced(False).names
    with pytest.raises(detachnet.TraceError, match=r"no module 'middle\.2' to keep whole[\s\S]*nearest *'middle"):
        detachnet.make_detachable(model, ["a"], SIZE, leaf_modules=["middle.2"])


def test_a_file_gives_the_same_layers_back(tmp_path: Path) -> None:
    model = Net(nn.Sequential(Block(without_gradients), Block(layer_drop)))
    net = detachnet.make_detachable(model, ["a"], SIZE).eval()
    detachnet.save(net, tmp_path / "family.safetensors")
    again = detachnet.load(tmp_path / "family.safetensors", model)
    assert again.plan.whole == net.plan.whole
    assert again.plan.whole.keys() == {"middle.0", "middle.1"}
    images = torch.randn(2, *SIZE)
    for one in (again, copy.deepcopy(net)):
        assert one.plan == net.plan
        torch.testing.assert_close(one(images, which="all"), net(images, which="all"))


def test_nothing_stays_after_a_failure() -> None:
    def fails(module: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            raise RuntimeError("no such thing")

    with pytest.raises(detachnet.TraceError, match=r"'middle' \(Block\) fails|Net"):
        detachnet.make_detachable(Net(Block(fails)), ["a"], SIZE)
    assert_nothing_stays()


def test_what_other_threads_do_is_none_of_a_traces_business() -> None:
    done, seen = threading.Event(), threading.Event()

    def meanwhile() -> None:
        layer = nn.Linear(2, 2)
        while not done.is_set():
            layer.scale = random.random()  # type: ignore[assignment]
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                models.Reverse.apply(layer(torch.zeros(1, 2)))  # type: ignore[no-untyped-call]
            swish(torch.zeros(1))
            seen.set()

    def run(module: Any, x: Tensor) -> Tensor:
        seen.clear()
        seen.wait(5)
        h: Tensor = module.conv(x)
        return h

    thread = threading.Thread(target=meanwhile)
    thread.start()
    try:
        traced = trace(Net(Block(run)), SIZE)
    finally:
        done.set()
        thread.join()
    assert traced.whole == {}
    assert traced.lost == ()
    assert_nothing_stays()


# The second line of defence: what is seen only by comparing.


def by_exact_class(module: Any, x: Tensor) -> Tensor:
    h: Tensor = module.conv(x) * (1 if type(x) is Tensor else 10)
    return h


def test_what_only_a_comparison_finds_is_kept_whole_too() -> None:
    model = Net(nn.Sequential(Block(by_exact_class), nn.ReLU()))
    net = detachnet.make_detachable(model, ["a", "c"], SIZE).eval()
    assert list(net.plan.whole) == ["middle.0"]
    assert "kept whole: 'middle.0' (its values are others in evaluation mode)" in str(net.plan)
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(net(images), net.base(images))
    with pytest.raises(detachnet.TraceError, match=r"the traced Root is not the model[\s\S]*module of its own"):
        detachnet.make_detachable(Root(by_exact_class), ["a"], SIZE)
    with pytest.raises(
        detachnet.TraceError, match=r"not the model[\s\S]*leaf_modules=\['middle'\] keeps it whole"
    ):
        detachnet.make_detachable(Net(Block(by_exact_class)), ["middle.conv"], SIZE)


def dropping(module: Any, x: Tensor) -> Tensor:
    return F.dropout(module.conv(x), 0.5, training=module.training)


def test_a_part_in_another_mode_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    model = Net(Block(dropping))
    net = detachnet.make_detachable(model.train(), ["a"], SIZE, norm="shared")
    images = torch.randn(2, *SIZE)
    assert not torch.equal(net(images, which="sub0"), net(images, which="sub0"))
    net.base.middle.eval()  # type: ignore[operator]
    assert torch.equal(net(images, which="sub0"), net(images, which="sub0"))
    assert "is traced again: another mode of 'middle'" in caplog.text
    caplog.clear()
    net.eval()(images)
    net.train().base.middle.eval()  # type: ignore[operator]
    net(images, which="all")
    assert caplog.text == ""
    assert not torch.equal(net.train()(images, which="sub0"), net(images, which="sub0"))
    torch.testing.assert_close(net.eval()(images), net.base(images))


def test_several_threads_make_families_at_once() -> None:
    found: list[dict[str, str]] = []

    def make() -> None:
        model = Net(Block(without_gradients))
        found.append(detachnet.make_detachable(model, ["a"], SIZE, check="none").plan.whole)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(whole) for whole in found] == [["middle"]] * 4
    assert_nothing_stays()


def test_a_profiler_goes_on() -> None:
    """Also behind the second trace, which listens for random numbers as a profiler listens for calls."""

    def noisy(block: Block, x: Tensor) -> Tensor:
        return block.conv(x) + random.random()

    def later() -> None:
        pass

    profiler = cProfile.Profile()
    profiler.enable()
    try:
        net = detachnet.make_detachable(Net(Block(noisy)), ["a"], SIZE, check="none")
        later()
    finally:
        profiler.disable()
    assert "random numbers" in net.plan.whole["middle"]
    assert later.__code__ in [entry.code for entry in profiler.getstats()]


def test_the_graphs_of_a_family_are_not_searched_for_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    looked = "detachnet.surgery.generators.parts_of"
    monkeypatch.setattr(looked, lambda value: seen.append(value) or parts_of(value))
    net = detachnet.make_detachable(Net(Block(without_gradients)), ["a"], SIZE, check="none")
    seen.clear()
    assert {type(found) for found in generators_of(net)} == {random.Random, np.random.Generator}
    assert seen
    assert not [value for value in seen if isinstance(value, fx.Node)]


elsewhere = ModuleType("elsewhere")
exec(  # a file of its own
    "import torch\ndef doubled(x):\n    return 2 * x if isinstance(x, torch.Tensor) else [2 * part for part in x]",
    vars(elsewhere),
)


class Asking(nn.Module):
    """Calls a function of another file, which asks for a class."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = elsewhere.doubled(x)
        return h


def test_isinstance_in_a_function_of_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elsewhere", elsewhere)
    net = detachnet.make_detachable(Net(nn.Sequential(Asking(), nn.Conv2d(8, 8, 1))), ["a"], SIZE).eval()
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(net(x), net.base(x))
    assert not {"isinstance", "len"} & vars(elsewhere).keys()


def test_a_decision_by_values_inside_a_try_is_none_of_a_traces() -> None:
    class Tried(Net):
        def forward(self, x: Tensor) -> Any:
            try:
                raw = bool((x > 100).any())
            except Exception:
                raw = False
            return super().forward(x / 255 if raw else x)

    with pytest.raises(detachnet.TraceError, match=r"needs values that are not there[\s\S]*\.any\(\)"):
        detachnet.make_detachable(Tried(nn.Identity()), ["a"], SIZE)


def test_features_left_for_a_loss_outside_are_told_of() -> None:
    """Of a model that has run before, too, in which others are found."""

    class Leaving(Net):
        def forward(self, x: Tensor) -> Any:
            self.left = {"a": self.a(x)}
            return self.fc(self.c(self.middle(self.b(self.left["a"]))).mean((2, 3)))

    model = Leaving(nn.Identity())
    model(torch.randn(2, *SIZE))
    hints = detachnet.make_detachable(model, ["b"], SIZE).plan.hints
    assert any(
        hint.startswith("the family does without what is left in 'left' at test_whole.py") for hint in hints
    )


class Penalty(nn.Module):
    """A layer that leaves a loss, and refuses what is not finite."""

    def forward(self, x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError("not finite")
        self.loss = x.square().mean()


class Kept(nn.Module):
    """A layer that keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.mean())
        return x


class Calling(nn.Module):
    """Calls a layer for its effect, or for nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(8, 8, 1), layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.layer(x)
        return x


@pytest.mark.parametrize(("layer", "left"), [(Penalty(), "loss"), (Kept(), "seen")], ids=["penalty", "kept"])
def test_a_layer_called_for_its_effect_is_called(layer: nn.Module, left: str) -> None:
    net, x = (
        detachnet.make_detachable(models.Around(Calling(layer)), ["a"], (3, 16, 16)),
        torch.randn(4, 3, 16, 16),
    )
    assert net.plan.whole["mid"].startswith("a call of 'mid.layer' for its effect at test_whole.py:")
    net(x)
    assert getattr(net.base.mid.layer, left)
    if left == "loss":
        with pytest.raises(ValueError, match="not finite"):
            net(x * float("nan"))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_layer_called_for_nothing_is_left_out() -> None:
    assert not detachnet.make_detachable(models.Around(Calling(Doubled())), ["a"], (3, 16, 16)).plan.whole


def test_a_call_for_its_effect_in_the_models_own_forward_is_named() -> None:
    class Model(models.Around):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.kept = Kept()

        def forward(self, x: Tensor) -> Tensor:
            self.kept(x)
            return super().forward(x)

    plan = detachnet.make_detachable(Model(), ["a"], (3, 16, 16)).plan
    assert any(
        hint.startswith("the family does without a call of 'kept' for its effect at ") for hint in plan.hints
    )


class Exact(nn.Module):
    """Runs in single precision inside autocast, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def test_a_forward_with_a_precision_of_its_own_in_autocast() -> None:
    net, x = (
        detachnet.make_detachable(models.Around(Exact()), ["a"], (3, 16, 16)).eval(),
        torch.randn(4, 3, 16, 16),
    )
    assert net.plan.whole.keys() == {"mid"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(net(x), net.base(x), rtol=0, atol=0)
