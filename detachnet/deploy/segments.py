"""model -> seconds that each part of it takes on this machine; they add up to those of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn

from detachnet.deploy.stopwatch import now
from detachnet.errors import MeasurementError
from detachnet.machine import find_device
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.making import make_detachable
from detachnet.surgery.modules import evaluating
from detachnet.surgery.spans import span_places
from detachnet.surgery.tracer import thaw


def measure_segments(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    device: str | torch.device = "cpu",
    batch: int = 1,
    n: int = 30,
    warmup: int = 3,
) -> dict[str, float]:
    """Seconds of each segment of a model, measured once: what a route takes is the sum over what it runs.

    Layer by layer a pass takes a little longer than as a whole; whole passes are timed in turn with the others,
    and the segments are scaled so that their sum is the median of the whole.

    Args:
        model: Any CNN; it is copied.
        input_size: Shape of one image, `(C, H, W)`; by default what the model declares.
        device: Where it is run.
        batch: Images per pass.
        n: Timed passes of each kind.
        warmup: Passes before these.

    Returns:
        The place at which a segment ends to its seconds, front to back; `""` is what follows the last.

    Raises:
        MeasurementError: The device is not there, or a number is out of range.
        TraceError: The model cannot be traced at that size.

    Examples:
        >>> seconds = detachnet.measure_segments(model)
        >>> net = detachnet.make_detachable(model, sub_models=[0.5], costs=seconds)
    """
    for name, value, least in (("batch", batch, 1), ("n", n, 1), ("warmup", warmup, 0)):
        if value < least:
            raise MeasurementError(f"{name}={value}: it is at least {least}")
    where = find_device(device)
    net = make_detachable(model, {}, input_size, check="none").to(where)
    traced = net.traced(False)
    places = {node: traced.name_of[node] for node in span_places(CutAnalysis(traced))}
    like = next(net.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *net.plan.input_size, generator=generator).to(where, like.dtype)
    timed, whole = _Timed(net, traced.graph, places), list[float]()
    with evaluating(net), torch.inference_mode():
        for i in range(warmup + n):
            began = now(where)
            net(images)
            if i >= warmup:
                whole.append(now(where) - began)
            timed.pass_through(images, keep=i >= warmup)
    medians = {name: median(seconds) for name, seconds in timed.seconds.items()}
    scale = median(whole) / max(sum(medians.values()), 1e-12)
    return {name: scale * seconds for name, seconds in medians.items()}


class _Timed(fx.Interpreter):
    """Runs a graph node by node and notes when each place is reached."""

    def __init__(self, net: nn.Module, graph: fx.Graph, places: Mapping[fx.Node, str]) -> None:
        super().__init__(net, graph=graph)
        self.places = places
        self.seconds: dict[str, list[float]] = {name: [] for name in (*places.values(), "")}
        self.marks: list[tuple[str, float]] = []
        self.device = torch.device("cpu")

    def pass_through(self, images: Tensor, keep: bool) -> None:
        """Run the graph; note the seconds of each segment if they are to be kept."""
        self.marks, began = [], now(images.device)
        self.device = images.device
        self.run(images)
        self.marks.append(("", now(images.device)))
        for name, reached in self.marks:
            if keep:
                self.seconds[name].append(reached - began)
            began = reached

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """A node's arguments, in types that may be changed."""
        return thaw(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; note the time behind a place."""
        out = super().run_node(n)
        if n in self.places:
            self.marks.append((self.places[n], now(self.device)))
        return out
