"""What functions do to channels: node + atoms of its arguments -> atoms of its value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from detachnet.surgery.tracer import Spec, leaves_of
from detachnet.surgery.widths.channels import (
    CONSTANT,
    SHARED,
    Channels,
    Layer,
    WholeError,
    along,
    compress,
    lean,
    spread,
)
from detachnet.surgery.widths.layers import join_groups, joined_along
from detachnet.text import Shape


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRUSTED = ("torch.", "torchvision.", "timm.", "_operator.", "builtins.", "math.")
_DISPATCHED: dict[Any, str] = {F.max_pool2d: "max_pool2d", F.max_pool1d: "max_pool1d", F.max_pool3d: "max_pool3d"}
_DISPATCHED |= {F.adaptive_max_pool2d: "adaptive_max_pool2d", F.adaptive_max_pool1d: "adaptive_max_pool1d"}
ELEMENTWISE = _names(
    """abs add alpha_dropout bernoulli bfloat16 celu clamp clamp_min clip cos div divide drop_path dropout
    dropout1d dropout2d dropout3d elu erf exp feature_dropout floor gelu gelu_quick gelu_tanh hard_sigmoid
    hard_swish hardshrink hardsigmoid hardswish hardtanh iadd imul isub itruediv leaky_relu lerp log log1p
    logsigmoid maximum minimum mish mul multiply neg pow quick_gelu radd reciprocal relu relu6 rmul round
    rsqrt rsub rtruediv selu sigmoid sign silu sin softplus softshrink softsign sqrt square stochastic_depth
    sub subtract swish tanh tanhshrink threshold truediv where"""
)
_FIRST = _names(
    """bfloat16 clone contiguous detach double float half requires_grad to type type_as zeros_like ones_like"""
)
_MADE = _names("new_empty new_full new_ones new_tensor new_zeros")
_MOVES = _names(
    """cat channel_shuffle chunk concat concatenate expand expand_as flatten flip getitem moveaxis movedim
    narrow nchw_to nhwc_to permute pixel_shuffle pixel_unshuffle repeat repeat_interleave reshape reshape_as
    roll rot90 select split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile transpose
    unbind unflatten unfold unsqueeze view view_as"""
)
_SPATIAL = _names(
    """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    avg_pool1d avg_pool2d avg_pool3d interpolate lp_pool2d max_pool1d max_pool2d max_pool3d upsample"""
)
_REDUCE = _names("amax amin logsumexp max mean min nanmean norm prod std sum var")
_COUPLE = _names("cumsum log_softmax normalize softmax")
_NORMS = _names(
    """batch_norm fast_group_norm fast_layer_norm fast_rms_norm fast_rms_norm2d group_norm instance_norm
    layer_norm layer_norm2d rms_norm rms_norm2d"""
)
_SHAPE = _names("dim get_device is_cuda is_floating_point ndimension numel size stride")
_SHAPE_ATTRIBUTES = ("shape", "ndim", "is_cuda")


@dataclass(frozen=True)
class _Call:
    """One call of a function; `spec` is its value's shape, in the nesting of the value."""

    channels: Channels
    node: fx.Node
    args: Any
    kwargs: Any
    spec: Any

    @property
    def name(self) -> str:
        return operation(self.node)

    def argument(self, at: int, *names: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        given = (self.kwargs[name] for name in names if name in self.kwargs)
        return self.args[at] if len(self.args) > at else next(given, default)

    @property
    def x(self) -> Tensor:
        """The first argument."""
        if not isinstance(self.args[0] if self.args else None, Tensor):
            raise WholeError("its first argument is no tensor")
        return self.args[0]  # type: ignore[no-any-return]


def operation(node: fx.Node) -> str:
    """The name of what a node calls, without the underscore of in-place operations."""
    target: Any = node.target
    name = target if isinstance(target, str) else _DISPATCHED.get(target, getattr(target, "__name__", ""))
    return str(name) if name.startswith("__") else str(name).rstrip("_")


def run_function(channels: Channels, node: fx.Node, args: Any, kwargs: Any, spec: Any) -> Any:
    """The atoms of a function's or a method's value; numbers as they are for one image.

    Raises:
        WholeError: The function, or how it is used, is not known.
    """
    call = _Call(channels, node, args, kwargs, spec)
    if not tensors_of((args, kwargs)):
        return map_aggregate(execute(node, args, kwargs), _constant)
    if asks_for_shape(node, args):
        return execute(node, args, kwargs)
    target: Any = node.target
    home = getattr(target, "__module__", None) or "torch"
    if not isinstance(target, str) and not f"{home}.".startswith(_TRUSTED):
        raise WholeError(f"{call.name} is a function that is not known")
    rule = next((rule for names, rule in _RULES if call.name in names), None)
    if rule is None:
        raise WholeError(f"{call.name or target} is an operation that is not known")
    return rule(call)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def asks_for_shape(node: fx.Node, args: Any) -> bool:
    """Whether a node gives a number of its argument's shape, or an item of a tuple."""
    name = operation(node)
    if name in ("getattr", "getitem") and not isinstance(args[0], Tensor):
        return True
    return name in _SHAPE or (name == "getattr" and args[1] in _SHAPE_ATTRIBUTES)


def execute(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run a node on atoms; `view` is `reshape`, which takes any layout in memory, and padding is a constant."""
    if operation(node) == "pad":
        return F.pad(args[0], args[1] if len(args) > 1 else kwargs["pad"])
    if node.op == "call_method":
        name = "reshape" if node.target == "view" else str(node.target)
        return getattr(args[0], name)(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)


def _constant(leaf: Any) -> Any:
    """A tensor the forward pass makes itself, as constants."""
    return torch.tensor(CONSTANT).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _move(call: _Call) -> Any:
    if call.name == "getitem" and tensors_of(call.args[1]):
        raise WholeError("it is indexed by a tensor")
    out = execute(call.node, call.args, call.kwargs)
    call.channels.moves.add(call.node)
    return map_aggregate(out, lambda leaf: lean(leaf) if isinstance(leaf, Tensor) else leaf)


def _attribute(call: _Call) -> Any:
    if call.args[1] in ("T", "mT"):
        return _move(call)
    if tensors_of(call.spec) or any(isinstance(leaf, Spec) for leaf in leaves_of(call.spec)):
        raise WholeError(f"its attribute {call.args[1]} is not known")
    return call.spec


def _first(call: _Call) -> Tensor:
    return call.x


def _made(call: _Call) -> Tensor:
    """A tensor that has nothing of its argument but the type."""
    return torch.tensor(CONSTANT).expand(call.spec.shape)


def _elementwise(call: _Call) -> Tensor:
    tensors = tensors_of((call.args, call.kwargs))
    return tensors[0] if len(tensors) == 1 else unite(call.channels, tensors)


def unite(channels: Channels, tensors: Sequence[Tensor]) -> Tensor:
    """What meets element by element stays or goes together.

    A tensor that is broadcast along an axis where another varies (a spatial gate) belongs to several channels: it
    stays, and unites nothing.
    """
    shape = broadcast(tensors)
    full = [(1,) * (len(shape) - t.ndim) + tuple(t.shape) for t in tensors]
    small = [compress(t).reshape([1] * (len(shape) - t.ndim) + list(compress(t).shape)) for t in tensors]
    own = []
    for i, atoms in enumerate(small):
        varied = [
            max(other.shape[axis] for j, other in enumerate(small) if j != i) > 1 for axis in range(len(shape))
        ]
        if any(size == 1 and varies for size, varies in zip(full[i], varied, strict=True)):
            channels.atoms.freeze(atoms, "it is broadcast over channels")
        elif not bool((atoms == SHARED).all()):
            own.append(atoms)
    if not own:
        return torch.tensor(CONSTANT).expand(shape)
    common = broadcast(own)
    first, *others = (atoms.expand(common) for atoms in own)
    for other in others:
        both = (first != SHARED) & (other != SHARED)
        channels.atoms.unite_pairs(first[both], other[both])
        first = torch.where(first == SHARED, other, first)
    return first.clamp_min(CONSTANT).expand(shape)


def broadcast(tensors: Sequence[Tensor]) -> Shape:
    """The shape in which tensors meet."""
    return tuple(torch.broadcast_shapes(*[t.shape for t in tensors]))  # type: ignore[no-untyped-call]


def _spatial(call: _Call) -> Tensor:
    x, shape = call.x, tuple(call.spec.shape)
    if x.ndim < 3 or len(shape) != x.ndim or shape[1] != x.shape[1]:
        raise WholeError("its channels are not along the second axis")
    return spread(along(x, 1), shape, 1)


def _pad(call: _Call) -> Tensor:
    pads, small = call.argument(1, "pad"), compress(call.x)
    padded = [axis for axis in range(call.x.ndim) if any(pads[2 * (call.x.ndim - 1 - axis) :][:2])]
    if all(small.shape[axis] == 1 for axis in padded):
        return small.expand(call.spec.shape)
    if call.argument(2, "mode", default="constant") != "constant":
        raise WholeError("channels are padded with channels")
    return _move(call)  # type: ignore[no-any-return]


def _axes(call: _Call) -> tuple[int, ...]:
    """The axes an operation reduces or couples."""
    at, default = (2, None) if call.name == "norm" else (2, 1) if call.name == "normalize" else (1, None)
    axes = call.argument(at, "dim", "axis", default=default)
    return tuple(range(call.x.ndim)) if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)


def _couple(call: _Call) -> Tensor:
    return joined_along(call.channels, call.x, _axes(call), call.name)


def _reduce(call: _Call) -> Tensor:
    if len(tensors_of((call.args, call.kwargs))) > 1:
        return _elementwise(call)
    if not isinstance(call.spec, Spec):
        raise WholeError("its value is not one tensor")
    axes, x = _axes(call), call.x
    x = joined_along(call.channels, x, axes, call.name)
    for axis in sorted({axis % x.ndim for axis in axes}, reverse=True):
        keeps = len(call.spec.shape) == call.x.ndim
        x = x.narrow(axis, 0, 1) if keeps else x.select(axis, 0)
    return x


def _norm(call: _Call) -> Tensor:
    """A norm called as a function: its parameters follow the channels, whole groups stay or go."""
    last = call.name in ("layer_norm", "rms_norm", "fast_layer_norm", "fast_rms_norm")
    axis = call.x.ndim - 1 if last else 1
    atoms, parameters = along(call.x, axis), tensors_of((call.args[1:], call.kwargs))
    sized = "layer_norm" in call.name or "rms_norm" in call.name
    shape = call.argument(1, "normalized_shape") if sized else ()
    if (sized and len(shape) != 1) or any(p.shape != atoms.shape for p in parameters):
        raise WholeError("it normalizes over more than channels")
    for parameter in parameters:
        call.channels.atoms.unite_pairs(atoms, parameter)
    if "group_norm" in call.name:
        why = f"{call.channels.traced.describe(call.node)} normalizes groups of channels"
        join_groups(call.channels, atoms, call.argument(1, "num_groups"), why)
    kind = "group norm" if "group_norm" in call.name else "layer norm" if sized else "norm"
    call.channels.norms[call.node] = Layer(kind, None, atoms, axis)  # type: ignore[arg-type]
    return call.x


_RULES: tuple[tuple[frozenset[str], Callable[[_Call], Any]], ...] = (
    (_FIRST, _first),
    (_MADE, _made),
    (ELEMENTWISE, _elementwise),
    (_MOVES, _move),
    (frozenset({"getattr"}), _attribute),
    (_SPATIAL, _spatial),
    (frozenset({"pad"}), _pad),
    (_REDUCE, _reduce),
    (_COUPLE, _couple),
    (_NORMS, _norm),
)
