"""What layers do to channels: layer + atoms of its input -> atoms of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from detachnet.surgery.tracer import PREFIX
from detachnet.surgery.widths.channels import Channels, Kind, Layer, WholeError, along, distinct, spread
from detachnet.text import Shape

MOVES = ("Flatten", "Unflatten", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "Permute")
"""Layers that only move elements."""
_TRUSTED = ("torch.nn.modules.", "timm.", "torchvision.")
_CONVOLUTIONS = ("Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
STANDARDIZED = _CONVOLUTIONS[1:]
"""Convolutions that standardize their weights over what they read."""
_CHANNELS_FIRST = (
    "LayerNorm2d",
    "LayerNorm2dFp32",
    "LayerNormExp2d",
    "RmsNorm2d",
    "RmsNorm2dFp32",
    "SimpleNorm2d",
)
_CHANNELS_LAST = (
    "LayerNorm",
    "LayerNormFp32",
    "RMSNorm",
    "RmsNorm",
    "RmsNormFp32",
    "SimpleNorm",
    "SimpleNormFp32",
)
_ELEMENTWISE = (
    "torch.nn.modules.activation",
    "torch.nn.modules.dropout",
    "torch.nn.modules.linear",
    "torch.nn.modules.container",
    "timm.layers.activations",
    "timm.layers.drop",
    "torchvision.ops.stochastic_depth",
)
_SPATIAL = (
    "torch.nn.modules.pooling",
    "torch.nn.modules.padding",
    "torch.nn.modules.upsampling",
    "timm.layers.pool2d_same",
    "timm.layers.adaptive_avgmax_pool",
)


@dataclass(frozen=True)
class _Call:
    """One call of a layer."""

    channels: Channels
    path: str
    module: nn.Module
    x: Tensor
    shape: Shape

    def through(self, kind: Kind, axis: int) -> Tensor:
        """The rule of layers with parameters of their own for each channel, which they let through."""
        axis %= self.x.ndim
        atoms = along(self.x, axis)
        self.channels.note(self.path, Layer(kind, None, atoms, axis))
        return spread(atoms, self.shape, axis)


def run_layer(channels: Channels, path: str, module: nn.Module, x: Tensor, shape: Shape) -> Tensor:
    """The atoms of a layer's output.

    Raises:
        WholeError: The layer, or how it is used, is not known.
    """
    rule = _rule(module)
    if rule is None and not _has_its_weight(module):
        raise WholeError("it computes its weight when it runs")
    if rule is None and "forward" in vars(module):
        raise WholeError("its forward is another one than that of its class")
    if rule is None:
        raise WholeError(f"{type(module).__name__} is a layer that is not known")
    return rule(_Call(channels, path, module, x, shape))


def is_known(module: nn.Module) -> bool:
    """Whether there is a rule for a layer."""
    return _rule(module) is not None or bool(class_names(module).intersection(MOVES))


def _rule(module: nn.Module) -> Callable[[_Call], Tensor] | None:
    names = class_names(module)
    rule = next((rule for known, rule in _RULES if names & known), None)
    return rule if _runs_as_known(module) else None


def class_names(module: nn.Module) -> set[str]:
    """The names of a layer's known classes, and the module of the one whose forward pass it runs."""
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith(_TRUSTED)}
    return names | {".".join(_home(module).split(".")[:4])}


def _name(call: _Call) -> str:
    return repr(call.path.removeprefix(PREFIX))


def _home(module: nn.Module) -> str:
    scripted = isinstance(module, torch.jit.ScriptModule)  # whose class has no forward that could be asked
    return "" if scripted else type(module).forward.__module__ or ""


def _runs_as_known(module: nn.Module) -> bool:
    """Whether a layer's forward pass and weights are those of its class."""
    return _home(module).startswith(_TRUSTED) and "forward" not in vars(module) and _has_its_weight(module)


def _has_its_weight(module: nn.Module) -> bool:
    """Whether a layer's weight is one of its tensors, if it has any: none that pruning or the like computes."""
    has_weight = not hasattr(module, "weight") or "weight" in {**module._parameters, **module._buffers}
    return has_weight and not hasattr(module, "parametrizations")


def _convolution(call: _Call) -> Tensor:
    module = call.module
    inherits = {type(module).forward.__module__, type(module)._conv_forward.__module__} <= {_ConvNd.__module__}  # type: ignore[attr-defined]
    if not isinstance(module, _ConvNd) or not (inherits or type(module).__name__ in _CONVOLUTIONS):
        raise WholeError(f"{type(module).__name__} is a convolution that is not known")
    reads, makes = along(call.x, 1), call.channels.made(call.path, module.out_channels)
    if len(reads) != module.in_channels:
        raise WholeError("it reads an image without a batch")
    if module.groups > 1:
        for ins, outs in zip(reads.view(module.groups, -1), makes.view(module.groups, -1), strict=True):
            for atom in [*ins.tolist(), *outs.tolist()]:
                call.channels.atoms.unite(int(outs[0]), atom)
    call.channels.note(call.path, Layer("conv", makes, reads))
    return spread(makes, call.shape, 1)


def _transposed(call: _Call) -> Tensor:
    module = call.module
    if not isinstance(module, _ConvTransposeNd) or module.groups > 1:
        raise WholeError("a grouped transposed convolution is not known")
    reads, makes = along(call.x, 1), call.channels.made(call.path, module.out_channels)
    call.channels.note(call.path, Layer("transposed", makes, reads))
    return spread(makes, call.shape, 1)


def _linear(call: _Call) -> Tensor:
    module = call.module
    if not isinstance(module, nn.Linear):
        raise WholeError(f"{type(module).__name__} is a layer that is not known")
    axis = call.x.ndim - 1
    reads, makes = along(call.x, axis), call.channels.made(call.path, module.out_features)
    call.channels.note(call.path, Layer("linear", makes, reads, axis))
    return spread(makes, call.shape, axis)


def _statistics(call: _Call) -> Tensor:
    act = getattr(call.module, "act", None)
    if act is not None and any(p.numel() > 1 for p in act.parameters()):
        raise WholeError("its activation has parameters for each channel")
    known = isinstance(call.module, _BatchNorm | _InstanceNorm) or hasattr(call.module, "running_mean")
    if not known or call.x.ndim < 2:
        raise WholeError(f"{type(call.module).__name__} is a norm that is not known")
    return call.through("norm", 1)


def _group_norm(call: _Call) -> Tensor:
    module, atoms = call.module, along(call.x, 1)
    if not isinstance(module, nn.GroupNorm):
        raise WholeError(f"{type(module).__name__} is a norm that is not known")
    join_groups(call.channels, atoms, module.num_groups, f"{_name(call)} normalizes groups of channels")
    return call.through("group norm", 1)


def join_groups(channels: Channels, atoms: Tensor, count: int, why: str) -> None:
    """Whole norm groups stay or go; a single one normalizes what is there."""
    if count > 1:
        for group in atoms.view(count, -1):
            channels.atoms.join(group, why)


def _layer_norm(call: _Call) -> Tensor:
    if len(getattr(call.module, "normalized_shape", (0,))) != 1:
        raise WholeError("it normalizes over more than channels")
    return call.through("layer norm", 1 if class_names(call.module) & {*_CHANNELS_FIRST} else -1)


def _response_norm(call: _Call) -> Tensor:
    return call.through("response norm", int(call.module.channel_dim))  # type: ignore[arg-type]


def _layer_scale(call: _Call) -> Tensor:
    return call.through("scale", 1 if "LayerScale2d" in class_names(call.module) else -1)


def _metaformer(call: _Call) -> Tensor:
    shape = getattr(call.module, "shape", ())
    if type(call.module).__name__ != "Scale" or len(shape) not in (1, 3):
        return _unknown(call)
    return call.through("scale", -len(shape))


def _prelu(call: _Call) -> Tensor:
    return call.through("scale", 1) if call.module.num_parameters != 1 else call.x


def _blur(call: _Call) -> Tensor:
    return call.through("blur", 1)


def _softmax(call: _Call) -> Tensor:
    axis = 1 if type(call.module).__name__ == "Softmax2d" else call.module.dim
    if not isinstance(axis, int):
        raise WholeError("its axis is not known")
    return joined_along(call.channels, call.x, (axis,), _name(call))


def joined_along(channels: Channels, x: Tensor, axes: tuple[int, ...], what: str) -> Tensor:
    """What an operation couples along some axes stays or goes together; the first stands for all."""
    for axis in axes:
        small = compress_axis(x, axis)
        if small.shape[axis] > 1:
            for row in distinct(small.movedim(axis, 0).flatten(1), 1).T:
                channels.atoms.join(row, f"{what} couples all of its channels")
            x = x.narrow(axis, 0, 1).expand(x.shape)
    return x


def compress_axis(x: Tensor, axis: int) -> Tensor:
    """Size 1 along an axis if nothing varies along it."""
    first = x.narrow(axis, 0, 1)
    return first if x.stride(axis) == 0 or bool((first == x).all()) else x


def _elementwise(call: _Call) -> Tensor:
    tensors = [*call.module.parameters(), *call.module.buffers()]
    holds_layers = next(call.module.children(), None) is not None
    if holds_layers or any(tensor.numel() > 1 for tensor in tensors) or call.shape != tuple(call.x.shape):
        raise WholeError(f"{type(call.module).__name__} is a layer that is not known")
    return call.x


def _spatial(call: _Call) -> Tensor:
    has_tensors = any(True for _ in [*call.module.parameters(), *call.module.buffers()])
    if (
        has_tensors
        or next(call.module.children(), None) is not None
        or call.x.ndim < 3
        or call.shape[1] != call.x.shape[1]
    ):
        raise WholeError(f"{type(call.module).__name__} is a layer that is not known")
    return spread(along(call.x, 1), call.shape, 1)


def _unknown(call: _Call) -> Tensor:
    raise WholeError(f"{type(call.module).__name__} is a layer that is not known")


_RULES: tuple[tuple[set[str], Callable[[_Call], Tensor]], ...] = (
    ({"_ConvTransposeNd"}, _transposed),
    ({"_ConvNd"}, _convolution),
    ({"_BatchNorm", "_InstanceNorm", "FrozenBatchNorm2d", "FrozenBatchNormAct2d"}, _statistics),
    ({"GroupNorm"}, _group_norm),
    ({*_CHANNELS_FIRST, *_CHANNELS_LAST}, _layer_norm),
    ({"GlobalResponseNorm"}, _response_norm),
    ({"Linear"}, _linear),
    ({"LayerScale", "LayerScale2d"}, _layer_scale),
    ({"timm.models.metaformer"}, _metaformer),
    ({"PReLU"}, _prelu),
    ({"BlurPool2d"}, _blur),
    ({"Softmax", "LogSoftmax", "Softmin", "Softmax2d"}, _softmax),
    ({"MultiheadAttention", "GLU", "Bilinear"}, _unknown),
    ({*_ELEMENTWISE, "LearnableAffineBlock"}, _elementwise),
    ({*_SPATIAL}, _spatial),
)
