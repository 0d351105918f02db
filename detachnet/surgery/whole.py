"""What of a model is kept whole, and why: what a trace would lose is noticed while it is made.

torch.fx records operations on tensors and nothing else. What a forward pass does besides (a context in which no
gradients are kept, random numbers of Python, a counter) happens once, while tracing, and never again. A `Watch`
listens for that. The smallest module whose own forward does it stays one layer, and the model is traced again.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import checkpoint

from detachnet.surgery.attributes import names_read
from detachnet.surgery.bytecode import compares_dtypes, gives_something, has_effect, steps_of
from detachnet.surgery.contents import TRACED
from detachnet.surgery.generators import drawn_from
from detachnet.surgery.state import marks_of, state_of
from detachnet.surgery.variables import is_users

if TYPE_CHECKING:
    from detachnet.surgery.tracer import Tracer

_OURS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
    contextlib.__file__,
    random.__file__,
    "<",
)
_QUESTIONS = {"device", "dtype", "get_device", "is_contiguous", "stride"}
_OF_DTYPE = {"is_floating_point", "is_complex", "is_signed", "element_size", "itemsize"}
_QUESTIONS_AT_ONCE = {"requires_grad", "grad_fn", "grad", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_mps"}
"""What is asked of a tensor that its twin on the meta device answers in another way."""
_HOOKS_OF_TENSORS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
_RANDOM_WORDS = re.compile(r"rand|choice|shuffle|sample|uniform|normal|bernoulli|gauss|\brng\b", re.IGNORECASE)


@dataclass(frozen=True)
class Reason:
    """What a module's own forward does that no trace holds.

    Attributes:
        what: In a few words, such as `no_grad`.
        where: File and line, and its text.
        decides: Whether the trace went one of two ways by it, which no comparison on this machine can excuse.
        counts: Whether it changes what a later pass may read, which no comparison of one pass can show.
        of_images: Whether that is made of the pass's images, rather than a table for all passes.
    """

    what: str
    where: str = ""
    decides: bool = False
    counts: bool = False
    of_images: bool = False

    @property
    def is_soft(self) -> bool:
        """Whether it need not change any values."""
        return is_soft(self.what)

    def __str__(self) -> str:
        place = self.where.split(": ")[0]
        return f"{self.what} at {Path(place).name}" if place else self.what


def is_soft(why: str) -> bool:
    """Whether that for which a module is kept whole need not change any values."""
    return "checkpointing" in why or why.startswith(_SOFT)


_SOFT = (
    "a forward hook",
    "a backward hook",
    "what is left in",
    "a decision by .is_contiguous",
    "a decision by .stride",
)


class LostError(Exception):
    """A trace that cannot go on; its watch knows why."""


@dataclass
class _Frame:
    """A module whose forward is running.

    Attributes:
        module: The module.
        path: Where it is in the model; empty for the model itself.
        contexts: What was switched on or off when it began.
        random: The random states when they were last looked at.
        state: What the module held besides tensors, likewise.
    """

    module: nn.Module
    path: str
    contexts: tuple[object, ...]
    random: tuple[object, ...]
    state: dict[str, Any]


@dataclass
class Watch:
    """Listens while a model is traced, in the thread that traces it.

    Attributes:
        tracer: What traces.
        stay_open: Paths of modules that are not kept whole for what changes no values.
        found: Path of a module → what its own forward does that would be lost.
        lost: The same of the model's own forward.
        hooks: Path of a module → its hooks, which are lost if it is opened.
        closely: Whether functions that draw random numbers are listened for, which takes time.
        moved: Whether a random state has moved, by this thread or another.
        called: Node that calls a layer of a user's class → the path of what calls it, and that as a reason.
        shaping: Nodes that give shapes which were asked for.
        drawn: The state of torch's random numbers before a function of torch that may draw some.
        written: Of each module that passes assign attributes of, by its id, their names: what is there before does
            not matter, or is another matter.
        opened: Path of each module whose forward was traced → the module.
        asked: Of each module that was asked for attributes, by its id, their names.
        marks: Path of each → what it held before, with a mark for each tensor.
    """

    tracer: Tracer
    stay_open: tuple[str, ...] = ()
    found: dict[str, Reason] = field(default_factory=dict)
    opened: dict[str, nn.Module] = field(default_factory=dict)
    asked: dict[int, set[str]] = field(default_factory=dict)
    marks: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: list[Reason] = field(default_factory=list)
    hooks: dict[str, Reason] = field(default_factory=dict)
    written: dict[int, set[str]] = field(default_factory=dict)
    closely: bool = False
    moved: bool = False
    drawn: bytes = b""
    shaping: set[fx.Node] = field(default_factory=set)
    called: dict[fx.Node, tuple[str, Reason]] = field(default_factory=dict)
    frames: list[_Frame] = field(default_factory=list)

    @contextmanager
    def inside(self, module: nn.Module, path: str) -> Iterator[None]:
        """While a module's own forward is traced."""
        self.look()
        if path not in self.opened:
            self.opened[path], self.marks[path] = module, marks_of(module)
        self.frames.append(_Frame(module, path, _contexts(), _random(), state_of(module)))
        if path and path in self.hooks and path not in self.stay_open:
            self.found.setdefault(path, self.hooks[path])
        yield  # after a failure the frames say where it was
        self.look()
        self.frames.pop()
        if self.frames:
            self.frames[-1].random = _random()
            self.frames[-1].state = state_of(self.frames[-1].module)

    def note(self, what: str, where: str | None = None, **kinds: bool) -> None:
        """The module whose forward is running does something that would be lost."""
        if self.frames and not self.tracer.probing:
            reason = Reason(what, source_line() if where is None else where, **kinds)
            self._keep(self.frames[-1].path, reason)

    def _keep(self, path: str, reason: Reason) -> None:
        """Keep a module whole, or note what of the model's own forward is lost."""
        if path and not (reason.is_soft and path in self.stay_open):
            self.found.setdefault(path, reason)
        elif reason.what not in [before.what for before in self.lost]:
            self.lost.append(reason)

    def calls(self, node: fx.Node, path: str) -> None:
        """The forward that is running calls a layer of a user's class."""
        reason = Reason(f"a call of {path!r} for its effect", source_line(), counts=True)
        self.called[node] = self.frames[-1].path, reason

    def called_for_effect(self, root: nn.Module) -> None:
        """Keep whole what calls layers whose result nothing takes, though they leave something, or may refuse."""
        for node, (path, reason) in self.called.items():
            if not node.users and has_effect(type(root.get_submodule(str(node.target))).forward):
                self._keep(path, reason)

    def step(self) -> None:
        """An operation is about to become a node: in the contexts its module began in?"""
        if self.frames and not self.tracer.probing:
            now, then = _contexts(), self.frames[-1].contexts
            if now != then:
                self.note(next(name for name, a, b in zip(_CONTEXTS, now, then, strict=True) if a != b))

    def look(self) -> None:
        """Whether the module whose forward is running has drawn random numbers, or switched something."""
        if not self.frames or self.tracer.probing:
            return
        self.step()
        self._look_at_state()
        frame, now = self.frames[-1], _random()
        moved, frame.random = [a != b for a, b in zip(now, frame.random, strict=True)], now
        if any(moved) and not self.closely:
            self.moved = True
        elif moved[1] and any(map(_RANDOM_WORDS.search, names_read(frame.module))):
            self.note(_RANDOM[1], _line_of(frame.module, _RANDOM_WORDS), decides=True)

    def _look_at_state(self) -> None:
        """Whether the module whose forward is running has changed what it holds besides tensors."""
        frame = self.frames[-1]
        before, frame.state = frame.state, state_of(frame.module)
        held = {name: value for name, value in before.items() if value is not None}  # None is to be filled
        for name in [name for name, value in held.items() if value != frame.state.get(name, value)]:
            line = _line_of(frame.module, re.compile(rf"\b{re.escape(name)}\b"))
            if drawn_from(frame.module, name):
                self.note("random numbers of its own", line, decides=True)
            elif isinstance(vars(frame.module).get(name), int | float | str):
                self.note(f"{name!r} changed", line, counts=True)
            else:
                self.note(f"what is left in {name!r}", line, counts=True)

    def filled(self) -> dict[str, Reason]:
        """Path of an opened module → what it holds, or reads, that its pass has left otherwise."""
        left = {}
        for path, module in self.opened.items():
            before = self.marks[path]
            changed = [(name, now) for name, now in marks_of(module).items() if before.get(name, _ABSENT) != now]
            for name, now in changed[:1]:
                line = _line_of(module, re.compile(rf"\b{re.escape(name)}\b"))
                left[path] = Reason(f"what is left in {name!r}", line, counts=True, of_images=TRACED in repr(now))
        return left

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this thread traces: on the second time, hear of every function that draws random numbers."""
        if not self.closely:
            yield
            return
        before: Any = sys.getprofile()
        sys.setprofile(self._hear)
        try:
            yield
        finally:
            is_profiler = hasattr(before, "enable")  # cProfile's, which is no function
            sys.setprofile(None if is_profiler else before)
            if is_profiler:
                before.enable()

    def _hear(self, _: FrameType, event: str, function: Any) -> None:
        """A function of C is called, or has returned; NumPy's are not heard."""
        if event not in ("c_call", "c_return") or not self.frames or self.tracer.probing:
            return
        name = getattr(function, "__name__", "")
        if isinstance(getattr(function, "__self__", None), random.Random):
            if name in ("random", "getrandbits"):
                self.note(_RANDOM[0], decides=True)
        elif name in _DRAWING:
            before, self.drawn = self.drawn, torch.get_rng_state().numpy().tobytes()
            if event == "c_return" and before != self.drawn:
                self.note(_RANDOM[2], decides=True)

    def reads(self, module: nn.Module, name: str) -> None:
        """The forward that is running reads an attribute of a module."""
        if self.frames:
            self.asked.setdefault(id(module), set()).add(name)

    def asks(self, name: str) -> None:
        """A traced value is asked for something that its twin answers in another way.

        Checkpointing asks, too, in torch 2.11, and is noted as what it is.
        """
        code = sys._getframe(2).f_code
        if name in _QUESTIONS_AT_ONCE and code.co_filename != checkpoint.__file__:
            self.note(f"a question about .{name}", decides=True)
        elif name in _HOOKS_OF_TENSORS:
            self.note("a hook of a tensor", decides=True)
        elif name == "backward":
            self.note("gradients of its own", decides=True)
        elif name == "dtype" and compares_dtypes(code):
            self.cannot_tell(name)

    def asks_shape_of(self, node: fx.Node) -> None:
        """A shape is asked for, which layers give by attributes of theirs: later, another one."""
        pending = [node]
        while pending:
            current = pending.pop()
            if current not in self.shaping:
                self.shaping.add(current)
                pending += current.all_input_nodes
                if current.op == "call_module":
                    layer = self.tracer.root.get_submodule(str(current.target))
                    self.asked.setdefault(id(layer), set()).update(_shaping(layer))

    def takes_gradient(self) -> None:
        """A tensor that takes a gradient and is no parameter is an argument; checkpointing has one of its own."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_OURS):
            if frame.f_code.co_filename == checkpoint.__file__:
                return
            frame = frame.f_back
        self.note("a tensor that takes a gradient and is no nn.Parameter", decides=True)

    def cannot_tell(self, name: str) -> None:
        """A decision is made by what a traced value stands for in a way that no traced value answers."""
        self.note(f"a decision by what .{name} is, not by ==", decides=True)

    def decides(self, node: fx.Node) -> None:
        """A decision is made by a value: does it come from such a question?"""
        pending, seen = [node], set[fx.Node]()
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            name = current.args[1] if current.target is getattr else current.target
            name = name if isinstance(name, str) else getattr(name, "__name__", "")
            if name in _OF_DTYPE or (current.target == "type" and len(current.args) + len(current.kwargs) == 1):
                name = "dtype"  # `type` is no question with a dtype beside it, and as an attribute a device's
            if name in _QUESTIONS:
                self.note(f"a decision by .{name}", decides=name in ("device", "get_device"))
                return
            if current.op == "call_function" or name in _TEXT or not seen - {current}:
                pending += current.all_input_nodes

    def assigned(self, module: nn.Module, name: str, value: object) -> None:
        """The forward that is running assigns an attribute; raises where the trace cannot go on."""
        if not self.frames or self.tracer.probing or name.startswith("_forward"):
            return
        before = vars(module).get(name)
        if not (name in self.asked.get(id(module), ()) and _is_plain(value) and value == before):
            self.written.setdefault(id(module), set()).add(name)
        traced = isinstance(value, fx.Proxy)
        held = name in module._buffers or isinstance(before, torch.Tensor)
        if held and (traced or isinstance(value, torch.Tensor)):
            self.note(f"{name!r} assigned", counts=True)
            if traced:
                raise LostError(f"{name!r} is assigned")
        elif _is_plain(value) and _is_plain(before) and name != "training" and value != before:
            self.note(f"{name!r} changed", counts=True)

    def written_to(self, path: str) -> set[str]:
        """The names of an opened module's attributes that passes assign."""
        return self.written.get(id(self.opened.get(path)), set())

    def writes(self, changed: object) -> None:
        """A node changes one of its arguments in place: a buffer of the module whose forward is running?"""
        if isinstance(changed, fx.Node) and changed.op == "get_attr" and self.frames:
            folder, _, name = str(changed.target).rpartition(".")
            try:
                owner = self.tracer.root.get_submodule(folder)
            except AttributeError:
                return
            if name in owner._buffers:
                self.note(f"{name!r} changed in place")
            elif isinstance(vars(owner).get(name), torch.Tensor):  # one that the forward pass has made, or holds
                self.note(OWN_TENSOR, counts=True)


OWN_TENSOR = "a tensor of its own changed in place"
"""Of which each pass gets a copy, so that nothing is lost where it was made in that pass."""
_ABSENT = object()
_CONTEXTS = ("no_grad", "inference_mode", "autocast", "autocast", "save_on_cpu or checkpointing")
_RANDOM = ("Python's random numbers", "NumPy's random numbers", "random numbers outside the graph")
_DRAWING = {
    *("bernoulli", "bernoulli_", "cauchy_", "dropout", "exponential_", "geometric_", "log_normal_", "multinomial"),
    *("normal", "normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like"),
    *("randperm", "random_", "uniform_"),
}
"""Functions of torch that draw random numbers."""
_TEXT = {"startswith", "endswith", "lower", "split"}


def _contexts() -> tuple[object, ...]:
    """What a trace does not record, in the order of `_CONTEXTS`."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


def _random() -> tuple[object, ...]:
    """The random states, in the order of `_RANDOM`."""
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), (numpy["key"].tobytes(), numpy["pos"]), torch.get_rng_state().numpy().tobytes()


def _shaping(layer: nn.Module) -> set[str]:
    """The names of a layer's attributes that the shape of what it gives may follow from; not of what it counts."""
    if not is_users(type(layer).__module__):
        return {"kernel_size", "stride", "padding", "dilation", "output_size", "size", "scale_factor", "ceil_mode"}
    plain = {name for name, value in vars(layer).items() if isinstance(value, int | float | tuple)}
    stored = {step.argval for step in steps_of(type(layer).forward) if step.opname == "STORE_ATTR"}
    return plain & names_read(layer) - {"training", *stored}


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str)


def source_line() -> str:
    """File, line and text of the innermost running frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    if frame is None:
        return ""
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = inspect.getframeinfo(frame, context=1).code_context
    return f"{file}:{line}: {text[0].strip() if text else ''}"


def _line_of(module: nn.Module, words: re.Pattern[str]) -> str:
    """The first line of a module's forward with one of some words, or that where it begins."""
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    try:
        lines, first = inspect.getsourcelines(forward)
        file = inspect.getsourcefile(forward)
    except (OSError, TypeError):
        return ""
    at = next((i for i, line in enumerate(lines) if words.search(line)), 0)
    return f"{file}:{first + at}: {lines[at].strip()}"


def hooked(model: nn.Module) -> dict[str, Reason]:
    """Path → the hooks of the user's that a module has; a graph runs them only where the module is one layer."""
    return {path: Reason(said) for path, module in model.named_modules() if (said := _hooks(module))}


def _hooks(module: nn.Module) -> str:
    kinds = {
        "a forward hook": [*module._forward_pre_hooks.values(), *module._forward_hooks.values()],
        "a backward hook": [*module._backward_pre_hooks.values(), *module._backward_hooks.values()],
    }
    for said, hooks in kinds.items():
        own = [hook for hook in hooks if _counts(hook)]
        if own:
            code = getattr(inspect.unwrap(own[0]), "__code__", None)
            return f"{said} from {Path(code.co_filename).name}:{code.co_firstlineno}" if code else said
    return ""


def _counts(hook: Any) -> bool:
    """Whether a hook is a user's, or one of torch's that gives something: others of torch's compute weights."""
    is_users_own = not getattr(hook, "__module__", type(hook).__module__).startswith("torch.")
    return is_users_own or gives_something(hook if hasattr(hook, "__code__") else type(hook).__call__)
