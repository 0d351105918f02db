"""Layers and tensors of a narrower network that read a part of the base-model's, which they do not own."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from detachnet.surgery.modules import copies_of_computed_tensors, hooks_of, meta_twin
from detachnet.surgery.widths.channels import Layer
from detachnet.surgery.widths.choice import Kept
from detachnet.surgery.widths.patch import kept_along_axes
from detachnet.surgery.widths.slicing import layer_picks, set_counts, slice_layer


class Pick:
    """What is kept of a tensor: where that is its front, a view of it; else a copy.

    Attributes:
        front: Axis → how many are kept, the first.
        indices: Axis → which are kept.
    """

    def __init__(self, picks: dict[int, Tensor], sizes: tuple[int, ...], *, alone: bool = False) -> None:
        self.front: dict[int, int] = {}
        self.indices: dict[int, Tensor] = {}
        for axis, index in picks.items():
            if len(index) == sizes[axis]:
                continue
            if torch.equal(index, torch.arange(len(index))) and not alone:
                self.front[axis] = len(index)
            else:
                self.indices[axis] = index

    def t(self) -> Pick:
        """The same of the transposed matrix."""
        made = copy.copy(self)
        made.front = {1 - axis: count for axis, count in self.front.items()}
        made.indices = {1 - axis: index for axis, index in self.indices.items()}
        return made

    def __call__(self, tensor: Tensor) -> Tensor:
        """What is kept."""
        for axis, count in self.front.items():
            tensor = tensor.narrow(axis, 0, count)
        for axis, index in self.indices.items():
            if index.device != tensor.device:
                self.indices[axis] = index.to(tensor.device)
            tensor = tensor.index_select(axis, self.indices[axis])
        return tensor


class SlicedLayer(nn.Module):
    """A layer with some of another layer's channels, whose weights it reads.

    It has no parameters of its own, and the other layer is no submodule of it: the base-model has both. What
    counts is what that layer holds when this one runs.

    Args:
        layer: The base-model's.
        channels: Its channels.
        kept: Which of them there are here.
    """

    def __init__(self, layer: nn.Module, channels: Layer, kept: Kept) -> None:
        super().__init__()
        self._of, self._channels, self._kept = [layer], channels, kept
        tensors = dict([*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)])
        picks = layer_picks(layer, channels, kept)
        self._picks = {name: Pick(picks[name], tuple(tensor.shape)) for name, tensor in tensors.items()}
        shape = meta_twin(layer)
        set_counts(shape, channels, kept)
        self._counts = {
            name: value
            for name, value in vars(shape).items()
            if _is_count(value) and value != vars(layer).get(name)
        }
        self._none = dict.fromkeys({*layer._parameters, *layer._buffers} - tensors.keys())
        self._call = _call_of(layer)

    @property
    def layer(self) -> nn.Module:
        """The base-model's."""
        return self._of[0]

    @property
    def parts(self) -> dict[str, tuple[Tensor, Pick]]:
        """Name of each tensor of the layer → the base-model's, and what is kept of it."""
        return {name: (getattr(self.layer, name), pick) for name, pick in self._picks.items()}

    def forward(self, x: Tensor) -> Any:
        """What the layer makes of its input's channels."""
        of = self._of[0]
        tensors = {name: pick(getattr(of, name)) for name, pick in self._picks.items()}
        is_hooked = any(hooks_of(of))
        if self._call is not None and not is_hooked:
            return self._call(x, tensors["weight"], tensors.get("bias"), of, self._counts)
        # An instance for this call alone: threads may run one layer at the same time.
        small = object.__new__(type(of))
        empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, **self._none}
        own = self._counts | empty | tensors
        vars(small).update(vars(of) | own)
        made = small(x)
        if is_hooked:  # what hooks leave on their layer is left on the base-model's
            vars(of).update((name, value) for name, value in vars(small).items() if name not in own)
        return made

    def detached(self) -> nn.Module:
        """The same as a plain layer with weights of its own."""
        own = copy.deepcopy(self.layer, copies_of_computed_tensors(self.layer))
        return slice_layer(own, self._channels, self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> SlicedLayer:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        own = {name: copy.copy(value) for name, value in vars(self).items()}
        vars(made).update(own, _of=copy.deepcopy(self._of, memo))
        return made

    def extra_repr(self) -> str:
        """What it is a part of."""
        return f"some channels of {self.layer}"


class SlicedTensor(nn.Module):
    """What is kept of a tensor that the graph reads itself.

    Args:
        tensor: The base-model's.
        atoms: Its channels.
        kept: Which of them there are here.
    """

    def __init__(self, tensor: Tensor, atoms: Tensor, kept: Kept) -> None:
        super().__init__()
        # What a pass changes in a buffer stays out of the base-model's.
        alone = not isinstance(tensor, nn.Parameter)
        self._pick = Pick(kept_along_axes(atoms, kept.mask), tuple(tensor.shape), alone=alone)

    def forward(self, tensor: Tensor) -> Tensor:
        """The kept part."""
        return self._pick(tensor)

    def detached(self, tensor: Tensor) -> Tensor:
        """The kept part with memory of its own; a parameter stays one."""
        part = self._pick(tensor.detach()).clone(memory_format=torch.contiguous_format)
        return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _is_count(value: object) -> bool:
    """Whether an attribute is a number or some, as those that say how many channels a layer has."""
    return all(isinstance(part, int) for part in value) if isinstance(value, tuple) else isinstance(value, int)


def _call_of(layer: nn.Module) -> Any:
    """The function of plain layers, which torch.compile sees through."""
    if type(layer).forward is nn.Linear.forward:
        return _linear
    plain = isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd)
    kinds = {nn.Conv1d: _conv1d, nn.Conv2d: _conv2d, nn.Conv3d: _conv3d}
    for kind, call in kinds.items() if plain and layer.padding_mode == "zeros" else ():
        if type(layer).forward is kind.forward and type(layer)._conv_forward is kind._conv_forward:  # type: ignore[attr-defined]
            return call
    return None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, _: Any, __: dict[str, Any]) -> Tensor:
    return F.linear(x, weight, bias)


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, of: Any, counts: dict[str, Any]) -> Tensor:
    return F.conv1d(x, weight, bias, of.stride, of.padding, of.dilation, counts.get("groups", of.groups))


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, of: Any, counts: dict[str, Any]) -> Tensor:
    return F.conv2d(x, weight, bias, of.stride, of.padding, of.dilation, counts.get("groups", of.groups))


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, of: Any, counts: dict[str, Any]) -> Tensor:
    return F.conv3d(x, weight, bias, of.stride, of.padding, of.dilation, counts.get("groups", of.groups))
