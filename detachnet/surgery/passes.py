"""family -> passes through copies of it: their outputs, gradients and buffers on a few random images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from detachnet.surgery.contents import generator_state
from detachnet.surgery.difference import seed_all, tensors, twin
from detachnet.surgery.generators import generators_kept, generators_of
from detachnet.surgery.modules import (
    copies_of_computed_tensors,
    in_precision,
    random_states,
    silence_hooks,
)
from detachnet.surgery.outside import Outside, Taken
from detachnet.surgery.plan import BASE

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet

EXACT_MACS = 100e6
"""MACs of the base-model up to which four images are taken, not two in training and one in evaluation mode, copies
have weights of their own, and joint passes are compared in float64 and in the gradients of all weights."""
_RANDOM_LAYERS = ("Dropout", "StochasticDepth", "DropPath", "DropBlock")


def is_large(net: DetachableNet) -> bool:
    """Whether a family is compared on less than all there is: see `EXACT_MACS`."""
    return net.plan[BASE].macs > EXACT_MACS


@dataclass
class Pass:
    """What a pass gave.

    Attributes:
        outputs: Its tensors.
        gradients: Parameter → its gradient; empty where none was asked for.
        buffers: Buffer → its value afterwards.
        draws: Whether random numbers were drawn.
        net: The copy that ran, with the state it is in.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    draws: bool
    net: DetachableNet


class Passes:
    """Passes through copies of a family, all from the same state.

    Args:
        net: The family.
        dtype: Of weights and images.
        images: How many.
    """

    def __init__(self, net: DetachableNet, dtype: torch.dtype, images: int) -> None:
        self.root = in_precision(twin(net, copies_of_computed_tensors(net)), dtype)
        silence_hooks(self.root)
        torch.manual_seed(0)
        _vary(self.root)
        spec = net.traced(False).image
        device = next(self.root.parameters(), torch.empty(0)).device
        shape = (images, *spec.shape[1:])
        self.images = (
            torch.randn(shape, dtype=torch.float32, device=device).to(dtype)
            if spec.dtype.is_floating_point
            else torch.randint(0, 2, shape, device=device).to(spec.dtype)
        )
        self._shares = is_large(net)
        self.one_image = self._shares
        """Whether passes in evaluation mode take one image."""
        self._parameters = dict(self.root.named_parameters())
        self._others = net._tracing.others
        self._outside = Outside(net.base)
        self._before = self._outside.taken()
        self._after = WeakKeyDictionary[nn.Module, Taken]()
        """Copy → what its last pass has left outside, where its next one begins."""

    def fresh(self) -> DetachableNet:
        """A copy; of a large model it shares the parameters."""
        memo = copies_of_computed_tensors(self.root)
        return twin(self.root, memo | {id(p): p for p in self.root.parameters() if self._shares})

    def run(
        self,
        forward: Callable[[DetachableNet, Tensor], Any],
        net: DetachableNet,
        training: bool,
        of: frozenset[str],
    ) -> Pass:
        """Run a copy; in training mode, with the gradients of some parameters."""
        net.train(training)
        for path in self._others[training]:
            net.base.get_submodule(path).training = not training
        seed_all()
        generators = generators_of(net)
        before = random_states(self.images.device), list(map(generator_state, generators))
        with self._going_on(net), generators_kept(generators), torch.set_grad_enabled(training and bool(of)):
            images = self.images[:1] if self.one_image and not training else self.images
            outputs = tensors(forward(net, images.clone()))
            draws = before != (random_states(self.images.device), list(map(generator_state, generators)))
        found = _gradients(net, outputs, of) if training else {}
        every = net.named_buffers(remove_duplicate=False)  # some belong to several models
        kept = {name: buffer for name, buffer in every if name not in net._buffers}
        kept |= {name: p.detach() for name, p in net.named_parameters() if self._has_changed(name, p)}
        return Pass([out.detach() for out in outputs], found, kept, draws, net)

    @contextmanager
    def _going_on(self, net: DetachableNet) -> Iterator[None]:
        """What copies share, as this one left it; afterwards as it was."""
        self._outside.put(self._after.get(net, self._before), anew=True)
        try:
            yield
            self._after[net] = self._outside.taken()
        finally:
            self._outside.put(self._before)

    def _has_changed(self, name: str, parameter: Tensor) -> bool:
        """Whether a pass has given a parameter of a copy another value, or has made it."""
        known = self._parameters.get(name)
        return known is None or not torch.equal(parameter, known)

    def switch_off(self) -> None:
        """Switch known random layers off."""
        for module in self.root.modules():
            if type(module).__name__.startswith(_RANDOM_LAYERS):
                for name in ("p", "drop_prob"):
                    if hasattr(module, name):
                        setattr(module, name, 0.0)


def _vary(net: nn.Module) -> None:
    """Change the weights of norms and the like a little: zeros there would hide what is behind them."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(0.1 * torch.rand_like(parameter) + 0.05)


def _gradients(net: nn.Module, outputs: list[Tensor], of: frozenset[str]) -> dict[str, Tensor | None]:
    """Some parameters' gradients of a sum of the outputs with weights that differ."""
    terms = [out for out in outputs if out.requires_grad]
    every = {name: p for name, p in net.named_parameters() if p.requires_grad}
    parameters = {name: p for name, p in every.items() if name in of}
    if not terms or not parameters:
        return dict.fromkeys(parameters)
    weighed = [(out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum() for out in terms]
    # Checkpointing refuses autograd.grad, and a choice of parameters.
    chosen = None if len(parameters) == len(every) else list(parameters.values())
    sum(weighed[1:], weighed[0]).backward(inputs=chosen)  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in parameters.items()}
    net.zero_grad()
    return found
