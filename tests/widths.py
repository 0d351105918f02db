"""A narrower network, and what it must equal: the model whose dropped columns are zero."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detachnet.surgery.graph import TracedModel
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import PREFIX
from detachnet.surgery.widths.channels import Channels, Layer
from detachnet.surgery.widths.choice import Kept, choose
from detachnet.surgery.widths.layers import STANDARDIZED
from detachnet.surgery.widths.propagation import find_channels
from detachnet.surgery.widths.slicing import slice_layer, slice_model


@dataclass(frozen=True)
class Narrowed:
    """A model in float64 with random norms and gains, a choice, and the narrower network."""

    model: nn.Module
    kept: Kept
    narrow: nn.Module
    images: Tensor

    @property
    def error(self) -> float:
        """The largest difference to the model whose dropped columns are zero, relative to its largest output."""
        with torch.no_grad():
            out, expected = (first(net(self.images)) for net in (self.narrow, masked(self.model, self.kept)))
        assert expected.isfinite().all()
        return float((out - expected).abs().max() / expected.abs().max())

    @property
    def changed(self) -> float:
        """How far the narrower network is from the model itself."""
        with torch.no_grad():
            out, full = first(self.narrow(self.images)), first(self.model(self.images))
        return float((out - full).abs().max() / full.abs().max())

    @property
    def whole(self) -> dict[str, str]:
        """Groups but the head's that stay whole, and why."""
        return {g.name: g.reason for g in self.kept.groups if g.reason and g.reason != "it is the output"}


def narrowed(model: nn.Module, image: tuple[int, ...], width: Any = 0.5, **kwargs: Any) -> Narrowed:
    model = randomize(model.double().eval())
    traced = trace(model, image)
    for name, value in traced.constants.items():
        traced.constants[name] = value.double() if value.is_floating_point() else value
    kept = choose(find_channels(traced), width, **kwargs)
    images = torch.randn(2, *image, dtype=torch.float64)
    return Narrowed(model, kept, slice_model(model, traced, kept), images)


def find(model: nn.Module, image: tuple[int, ...]) -> tuple[TracedModel, Channels]:
    traced = trace(model, image)
    return traced, find_channels(traced)


def first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def randomize(model: nn.Module) -> nn.Module:
    """Norms, gains and layer scales are random: initialized with zero, they would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.numel() == max(p.shape, default=1):
                one = torch.rand(p.shape, generator=generator, dtype=p.dtype)
                p.copy_(one * 0.2 - 0.1 if name.endswith("bias") else 0.5 + one)
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                one = torch.rand(b.shape, generator=generator, dtype=b.dtype)
                b.copy_(one * 0.2 - 0.1 if name.endswith("mean") else 0.5 + one)
    return model


class _Within(nn.Module):
    """A norm over channels: those that are kept are normalized among themselves, the others are zero."""

    def __init__(self, small: nn.Module, index: Tensor, axis: int) -> None:
        super().__init__()
        self.small, self.index, self.axis = small, index, axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_copy(
            self.axis, self.index, self.small(x.index_select(self.axis, self.index))
        )


def masked(model: nn.Module, kept: Kept) -> nn.Module:
    """The model at its full size, in which nothing reads the dropped channels."""
    model = copy.deepcopy(model)
    for path, layer in kept.channels.layers.items():
        module, reads = model.get_submodule(path.removeprefix(PREFIX)), kept.indices(layer.reads)
        whole_norm = layer.kind == "group norm" and module.num_groups == 1
        dropped = torch.ones(len(layer.reads), dtype=torch.bool).index_fill(0, reads, False)
        if len(reads) == len(layer.reads):
            continue
        if layer.kind in ("layer norm", "response norm") or whole_norm:
            small = slice_layer(copy.deepcopy(module), layer, kept)
            model.set_submodule(path.removeprefix(PREFIX), _Within(small, reads, layer.axis))
        elif getattr(module, "groups", 1) > 1:
            continue  # whole groups stay or go
        elif type(module).__name__ in STANDARDIZED:
            _standardize(module, layer, kept)
        elif layer.kind in ("conv", "linear", "transposed"):
            with torch.no_grad():
                module.weight[dropped if layer.kind == "transposed" else (slice(None), dropped)] = 0.0
    for node, layer in kept.channels.norms.items():
        if layer.kind == "layer norm" and len(reads := kept.indices(layer.reads)) < len(layer.reads):
            owner = kept.channels.traced.name_of[node].rpartition(".")[0]
            assert owner, "a norm over channels that the model itself calls as a function"
            small: Any = _narrow_norm(model.get_submodule(owner), f"{PREFIX}{owner}.", kept)
            model.set_submodule(owner, _Within(small, reads, 1 if type(small).__name__.endswith("2d") else -1))
    return model


def _narrow_norm(module: nn.Module, prefix: str, kept: Kept) -> nn.Module:
    """A module that calls a norm as a function, and what works element by element, for the kept channels."""
    small: Any = copy.deepcopy(module)
    for target, atoms in kept.channels.tensors.items():
        if target.startswith(prefix):
            name, index = target.removeprefix(prefix), kept.indices(atoms)
            setattr(small, name, nn.Parameter(getattr(small, name)[index]))
            small.normalized_shape = (len(index),)
    return small


def _standardize(module: Any, layer: Layer, kept: Kept) -> None:
    """A convolution that standardizes its weights does so over the kept columns; then it is a plain one."""
    small: Any = slice_layer(copy.deepcopy(module), layer, kept)
    weight = F.batch_norm(
        small.weight.reshape(1, small.out_channels, -1),
        None,
        None,
        weight=(small.gain * small.scale).view(-1) if hasattr(small, "gain") else None,
        training=True,
        momentum=0.0,
        eps=small.eps,
    ).reshape_as(small.weight)
    assert layer.makes is not None
    rows, columns = kept.indices(layer.makes), kept.indices(layer.reads)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[rows[:, None], columns[None]] = weight
    module.__class__ = _Plain


class _Plain(nn.Conv2d):
    """A convolution with padding as its input needs, whose weights are used as they are."""

    same_pad = False

    def forward(self, x: Tensor) -> Tensor:
        from timm.layers import pad_same

        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        padding = 0 if self.same_pad else self.padding
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]
