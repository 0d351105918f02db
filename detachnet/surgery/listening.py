"""What torch.fx lets pass, caught at its source while some thread traces.

Functions with a backward of their own, script functions and checkpointing run, rather than become nodes;
attributes are assigned, contexts entered. While a trace lasts, these tell the watch of the thread that traces.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import torchvision
from torch import fx, nn
from torch.utils.checkpoint import CheckpointFunction

from detachnet.surgery.attributes import names_of
from detachnet.surgery.modules import TURN
from detachnet.surgery.variables import OF_MODULES, functions_of, is_users
from detachnet.surgery.whole import Watch

_local = threading.local()
_LIBRARIES = (
    *(str(Path(f"{package.__file__}").parent) for package in (torch, timm, torchvision)),
    str(Path(__file__).parents[1]),
)
"""What may ask what is switched on without deciding anything by it."""
_CASTS = "decorate_fwd"
"""What `torch.amp.custom_fwd` makes of a forward, which asks for autocast."""
_OF_PROCESSES = ("is_initialized", "get_world_size", "get_rank") if torch.distributed.is_available() else ()


def _questions(part: ModuleType) -> Iterator[tuple[ModuleType, str]]:
    """The functions of a part of torch that tell what is switched on: something sets it, or they are called so."""
    for name, function in vars(part).items():
        has_setter = name.startswith("get_") and name.replace("get_", "set_", 1) in vars(part)
        is_called_so = name.startswith("is_in_") or name.endswith("_enabled")
        is_other = name.startswith(("_", "set_")) or "rng" in name  # random numbers are another matter
        if callable(function) and (has_setter or is_called_so) and not is_other:
            yield part, name


_QUESTIONS = (
    *(question for part in (torch, torch.onnx, torch.backends.cuda) for question in _questions(part)),
    *((torch.distributed, name) for name in _OF_PROCESSES),
)
_FLAGS = ((torch.backends.ContextProp, "__get__"), (type(torch.backends.cuda.matmul), "__getattr__"))
"""How flags such as `torch.backends.cudnn.benchmark` are read."""


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Let a watch hear what happens in this thread."""
    before = getattr(_local, "watch", None)
    _local.watch = watch
    try:
        with _PATCHES:
            yield
    finally:
        _local.watch = before


def answer_builtins(module: nn.Module) -> None:
    """Until the trace ends, `isinstance` and `len` in the files of a module's classes know of traced values."""
    files = [vars(sys.modules[c.__module__]) for c in type(module).__mro__ if c.__module__ in sys.modules]
    called = (function.__globals__ for function in functions_of(module))
    for names in [*files, *(names for names in called if is_users(names.get("__name__")))]:
        for name, answer in {"isinstance": _is_instance, "len": _length}.items():
            if name not in names and not names["__name__"].startswith(("torch.", "builtins")):
                names[name] = answer
                _PATCHES.asking.append((names, name))


def _is_instance(value: Any, kind: Any) -> bool:
    """`isinstance`, which a traced value passes as what it stands for."""
    watch = _current() if type(value).__module__ == "detachnet.surgery.tracer" else None
    if watch is None or not isinstance(value, fx.Proxy) or isinstance(value, kind):
        return isinstance(value, kind)
    return issubclass(watch.tracer.class_of(value), kind)


def _length(value: Any) -> Any:
    """`len`, which of a traced batch is as its shape has it, a traced number."""
    watch = _current() if isinstance(value, fx.Proxy) else None
    if watch is None or watch.tracer.known(value.node, length_only=True)[0]:
        return len(value)
    return value.shape[0] if issubclass(watch.tracer.class_of(value), torch.Tensor) else len(value)


class _Patches:
    """What classes have in their own namespaces, replaced while a thread traces; others wait, for torch.fx."""

    def __init__(self) -> None:
        self.tracing = 0
        self.originals: list[tuple[Any, str, Any]] = []
        self.asking: list[tuple[dict[str, Any], str]] = []

    def __enter__(self) -> None:
        TURN.acquire()
        self.tracing += 1
        if self.tracing == 1:
            for owner, name, make in _REPLACED:
                self.originals.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, make(vars(owner).get(name, getattr(owner, name))))

    def __exit__(self, *_: object) -> None:
        self.tracing -= 1
        while not self.tracing and self.originals:
            owner, name, original = self.originals.pop()
            if original is None:  # it has that of its own class
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        while not self.tracing and self.asking:
            names, answered = self.asking.pop()
            del names[answered]
        TURN.release()


def _current() -> Watch | None:
    """The watch of this thread, while its tracer records."""
    watch: Watch | None = getattr(_local, "watch", None)
    return watch if watch is not None and not watch.tracer.probing else None


def _traced_apply(original: Any) -> Any:
    """`autograd.Function.apply` of a traced value: one node, so that its backward is kept."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        watch = _current()
        if watch is None or not _has_proxy((args, kwargs)):
            return original.__get__(None, cls)(*args, **kwargs)
        if cls is CheckpointFunction:
            watch.note("checkpointing")
            return args[0](*args[2:])
        return watch.tracer.create_proxy("call_function", Applied(cls), args, kwargs)

    return classmethod(apply)


def _told_device(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if isinstance(device_type, fx.Proxy) else device_type, *args, **kwargs)

    return init


def _noted_autocast(original: Callable[..., Any]) -> Callable[..., Any]:
    def enter(self: Any) -> Any:
        if watch := _current():
            watch.note("autocast")
        return original(self)

    return enter


def _noted_question(original: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """A question about what is switched on around the model, where a model asks it."""
    asked = name or original.__name__

    def ask(*args: Any, **kwargs: Any) -> Any:
        code = sys._getframe(1).f_code
        is_cast = code.co_name == _CASTS and asked == "is_autocast_enabled"
        is_libraries = code.co_filename.startswith(_LIBRARIES) and not is_cast
        if (watch := _current()) and not is_libraries:
            watch.note(f"a question about {asked}", decides=True)
        return original(*args, **kwargs)

    return ask


def _noted_flag(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same of a flag of torch.backends."""
    return _noted_question(original, "a flag of torch.backends")


def _noted_getattribute(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_attribute(self: nn.Module, name: str) -> Any:
        if (name not in OF_MODULES or name == "training") and (watch := _current()):
            watch.reads(self, name)
        return original(self, name)

    return get_attribute


def _noted_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    """Parameters themselves, of which there are twins: what these take gradients for is another matter."""

    def parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (watch := _current()) and "requires_grad" in names_of(sys._getframe(1).f_code):
            watch.note("a question about .requires_grad", decides=True)
        return original(self, *args, **kwargs)

    return parameters


def _noted_setattr(original: Callable[..., None]) -> Callable[..., None]:
    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if watch := _current():
            watch.assigned(self, name, value)
        original(self, name, value)

    return set_attribute


def _noted_register(original: Callable[..., None]) -> Callable[..., None]:
    def register_buffer(self: nn.Module, name: str, tensor: Any, *args: Any, **kwargs: Any) -> None:
        if watch := _current():
            watch.assigned(self, name, tensor)
        original(self, name, tensor, *args, **kwargs)

    return register_buffer


def _traced_parameter(original: Callable[..., Any]) -> Callable[..., Any]:
    """A weight or buffer that is asked for by its name is the traced one."""

    def get(self: nn.Module, target: str) -> Any:
        if _current() is None:
            return original(self, target)
        path, _, name = target.rpartition(".")
        return getattr(self.get_submodule(path), name)

    return get


def _traced_script(original: Callable[..., Any]) -> Callable[..., Any]:
    """A script function of a traced value is one node."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = _current()
        if watch is None or not _has_proxy((args, kwargs)):
            return original.__get__(self, type(self))(*args, **kwargs)
        return watch.tracer.create_proxy("call_function", Scripted(self), args, kwargs)

    return call


def _has_proxy(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_proxy, value))
    return any(map(_has_proxy, value.values())) if isinstance(value, dict) else isinstance(value, fx.Proxy)


_REPLACED: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (torch, "is_tensor", lambda _: lambda value: _is_instance(value, torch.Tensor)),
    *((owner, name, _noted_question) for owner, name in _QUESTIONS),
    *((owner, name, _noted_flag) for owner, name in _FLAGS),
    (torch.autograd.Function, "apply", _traced_apply),
    (torch.autocast, "__init__", _told_device),
    (torch.autocast, "__enter__", _noted_autocast),
    (nn.Module, "__getattribute__", _noted_getattribute),
    (nn.Module, "__setattr__", _noted_setattr),
    *((nn.Module, name, _noted_parameters) for name in ("parameters", "named_parameters")),
    (nn.Module, "register_buffer", _noted_register),
    *((nn.Module, name, _traced_parameter) for name in ("get_parameter", "get_buffer")),
    (torch.jit.ScriptFunction, "__call__", _traced_script),
]
_PATCHES = _Patches()


class Applied:
    """`function.apply` as a graph calls it."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__, self.__module__ = function.__name__, __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives, with its backward."""
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Applied) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return Applied, (self.function,)


class Scripted:
    """A script function as a graph calls it: it copies and pickles, by where it is found."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__, self.__module__ = str(function.name), __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scripted) and self.function is other.function

    def __hash__(self) -> int:
        return hash(id(self.function))

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is self.function:
                    return _scripted, (module.__name__, name)
        raise TypeError(f"the script function {self.__name__!r} is in no module, so it cannot be pickled")


def _scripted(module: str, name: str) -> Scripted:
    return Scripted(getattr(import_module(module), name))
