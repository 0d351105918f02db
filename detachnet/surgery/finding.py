"""graph + weights -> what joins the images of a batch, found by running each operation on halves of a batch.

Where several models share a batch, an operation is exact if what it makes of all their images is what it makes of
each model's images alone. That is tried, node by node, with random values of the right shapes: on a batch of two
models' images, and on each model's half of it. No list of operations is needed, and no whole pass is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from detachnet.surgery.coupling import ONCE, Coupling, Verdict
from detachnet.surgery.graph import TracedGraph, has_torch_names, writes_in_place
from detachnet.surgery.halves import (
    HALF,
    Layout,
    MeetError,
    batch_axis,
    cloned,
    counts_images,
    equal,
    factors,
    halved,
    mapped,
    mapped_pair,
    shape_for,
    tensors_of,
    whole_numbers,
)
from detachnet.surgery.modules import (
    attribute,
    copy_model,
    random_states,
    random_states_kept,
    silence_hooks,
    weight_of,
)
from detachnet.surgery.tracer import Spec, leaves_of, thaw
from detachnet.surgery.whole import Reason

SEEDS = 5
"""Times that an operation which draws random numbers is tried."""
_ALL_GO_IN = "gives a value that all images of a batch go into"
_ROWWISE = {
    f"torch.nn.modules.{name}"
    for name in ("activation", "batchnorm", "conv", "dropout", "linear", "normalization", "padding", "pooling")
}
"""Where torch keeps the layers that treat each row of the first axis by itself, as they are documented to."""


_MOST_VALUES = 1 << 22
"""Of what follows from the number of images: more values of it are not worked out."""


class _UnfitError(Exception):
    """A node that cannot be run on values of its shapes."""


def find_coupling(
    traced: TracedGraph,
    second: Mapping[fx.Node, Any],
    training: bool,
    net: nn.Module,
    hooks: Mapping[str, Reason],
) -> dict[fx.Node, Verdict] | None:
    """The verdicts that running the nodes gives; None where there are no weights to run with.

    Args:
        traced: The graph of one mode.
        second: Its values at another batch size, as `TracedGraph.propagate(PROBE_BATCH + 1)` gives them.
        training: That mode.
        net: What the graph's targets refer to; it is left as it is, the random state too.
        hooks: Path of a layer -> its hooks, which see the images of all models at once where it runs once.
    """
    like = weight_of(net)
    if like.is_meta:
        return None
    with random_states_kept(like.device), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        torch.manual_seed(0)
        return _Finder(traced, second, training, net, like, hooks).find()


class _Finder:
    """Walks a graph front to back; knows of each value where its images are."""

    def __init__(
        self,
        traced: TracedGraph,
        second: Mapping[fx.Node, Any],
        training: bool,
        net: nn.Module,
        like: Tensor,
        hooks: Mapping[str, Reason],
    ) -> None:
        self.traced, self.second, self.net, self.like = traced, second, net, like
        self.listed, self.hooks = Coupling(traced, training), hooks
        self.layouts: dict[fx.Node, list[Layout | None]] = {}
        """Pixel-dependent node -> the layout of each tensor in its value; None for one without images."""
        self.full: dict[fx.Node, Any] = {}
        """Node -> its value for two models' images."""
        self.settled: set[fx.Node] = set()
        """Nodes that have no use for the values of their inputs any more."""
        self.halves: dict[fx.Node, Any] = {}
        """Node that does not depend on pixels -> its value for one model's images."""
        self.random: set[fx.Node] = set()
        """Nodes that draw random numbers, and those that come of them without pixels."""
        self.changes = False
        """Whether the layer that was run last has changed one of its buffers."""
        self.reaches: dict[fx.Node, int] = {}
        """Node that does not depend on pixels -> the largest whole number that it is made by."""
        self.known: dict[str, tuple[Verdict, list[Layout | None]]] = {}

    def find(self) -> dict[fx.Node, Verdict]:
        """Each pixel-dependent node's verdict, up to the first that ends the joint pass."""
        found: dict[fx.Node, Verdict] = {}
        for node in self.traced.live:
            if node.op == "placeholder":
                self.layouts[node] = [Layout(0, 1, 1)]
            elif node.op != "output" and node in self.traced.readers:
                try:
                    found[node], self.layouts[node] = self._judge(node)
                except MeetError as error:
                    return found | {node: Verdict("never", str(error))}
                if node in self.full or self._is_made_up(node):
                    self._settle(node)
        return found

    def _judge(self, node: fx.Node) -> tuple[Verdict, list[Layout | None]]:
        listed = self.listed.verdict(node)
        if listed.how == "never":
            raise MeetError(listed.why)
        if listed.how == "per model":
            return listed, self._stacked_layouts(node)
        if said := self._hooks_of(node):
            why = f"has {said}, which may join the images of a batch"
            return Verdict("per model", why), self._stacked_layouts(node)
        if self._is_rowwise(node) and (same := self._layouts_like_input(node)):
            return ONCE, same
        key = self._signature(node)
        if key not in self.known:
            try:
                verdict = self._run(node)
            except _UnfitError:
                return listed, self._assumed_layouts(node)
            if not key:
                return verdict
            self.known[key] = verdict
        return self.known[key]

    # Layouts from shapes.

    def _axes(self, node: fx.Node) -> list[tuple[int, int] | None]:
        """For each tensor of a node's value the axis that follows the batch and its size for one image."""
        value, other = self.traced.values[node], self.second[node]
        changed = node.args[0] if value is None and writes_in_place(node) else None
        if isinstance(changed, fx.Node):
            value, other = self.traced.values[changed], self.second[changed]
        return [
            batch_axis(one, two)
            for one, two in zip(leaves_of(value), leaves_of(other), strict=True)
            if isinstance(one, Spec)
        ]

    def _stacked_layouts(self, node: fx.Node) -> list[Layout | None]:
        """The layouts of a node that runs model by model: the models are stacked along the first axis."""
        layouts: list[Layout | None] = [Layout(a[0], 1, a[1]) if a else None for a in self._axes(node)]
        inputs = [layout for n in self._data_inputs(node) for layout in self.layouts[n]]
        if any(layout is None or not layout.is_first for layout in [*layouts, *inputs]):
            raise MeetError("gives a value without the batch as its first axis")
        return layouts

    def _layouts_like_input(self, node: fx.Node) -> list[Layout | None] | None:
        """The layout of a row-wise layer's output, which is its input's; None if that is not sure."""
        layouts = [layout for n in self._data_inputs(node) for layout in self.layouts[n]]
        axes = self._axes(node)
        sure = len(axes) == len(layouts) == 1 and layouts[0] is not None and layouts[0].axis == 0
        same = sure and layouts[0] is not None and axes[0] == (0, layouts[0].outer * layouts[0].inner)
        return layouts if same else None

    def _assumed_layouts(self, node: fx.Node) -> list[Layout | None]:
        return [Layout(axis[0], 1, axis[1]) if axis else None for axis in self._axes(node)]

    def _data_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self.traced.data]

    def _is_rowwise(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self.net.get_submodule(str(node.target))
        plain = type(module).__module__ in _ROWWISE and not isinstance(module, nn.MultiheadAttention)
        is_changed = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        return plain and not hasattr(module, "dim") and not is_changed

    def _hooks_of(self, node: fx.Node) -> str:
        """The hooks of a layer that a node calls, in words."""
        if node.op != "call_module":
            return ""
        inside = (reason for path, reason in self.hooks.items() if f"{path}.".startswith(f"{node.target}."))
        return next((reason.what for reason in inside), "")

    def _signature(self, node: fx.Node) -> str:
        """What an operation's verdict depends on; empty where that is more than text can say."""
        if node.op == "call_module":
            return ""
        others = [n for n in node.all_input_nodes if n not in self.traced.data]
        if any(isinstance(leaf, Spec) for n in others for leaf in leaves_of(self.traced.values[n])):
            return ""

        def said(leaf: fx.Node) -> Any:
            return self.traced.values[leaf], self.second[leaf], self.layouts.get(leaf)

        args, kwargs = (mapped(value, said) for value in (node.args, node.kwargs))
        return repr((node.op, node.target, args, kwargs))

    # Running.

    def _run(self, node: fx.Node) -> tuple[Verdict, list[Layout | None]]:
        """Run a node on two models' images and on each one's alone; compare."""
        try:
            given = {n: cloned(self._full(n)) for n in node.all_input_nodes}
            self.changes = False
            full, draws = self._drawing(lambda: self._value_of(node, given.__getitem__))
        except Exception as error:  # whatever an operation raises on random values
            raise _UnfitError from error
        if self.changes:
            return Verdict("per model", "changes what it holds at each call"), self._stacked_layouts(node)
        axes = self._axes(node)
        layouts: list[Layout | None] | None
        of_images = any(
            isinstance(self.traced.values[n], Spec) for n in node.all_input_nodes[:1]
        )  # not of several
        if (of_images and counts_images(node)) or not all(map(self._is_periodic, node.all_input_nodes)):
            layouts = None  # by numbers that so few images do not reach
        elif draws:
            layouts = self._random_layouts(node, axes)
        else:
            layouts = self._layouts_of(full, self._try_halves(node), self._candidates(node, axes))
        if layouts is not None:
            self.full[node] = full
            return ONCE, layouts
        if writes_in_place(node):
            raise MeetError("changes a value in place across the images of a batch")
        if has_torch_names(full) and any(user.target is getattr for user in node.users):
            raise MeetError("joins the images of a batch in values with names")
        stacked = self._stacked_layouts(node)
        return Verdict("per model", "joins the images of a batch"), stacked

    def _drawing(self, run: Callable[[], Any]) -> tuple[Any, bool]:
        """What a function gives, and whether it draws random numbers."""
        before = random_states(self.like.device)
        out = run()
        return out, before != random_states(self.like.device)

    def _try_halves(self, node: fx.Node) -> list[Any] | None:
        """A node's values for each model alone; None where it cannot be run on fewer images."""
        try:
            return [self._value_of(node, lambda n, i=i: cloned(self._half(n, i))) for i in (0, 1)]  # type: ignore[misc]
        except Exception:  # whatever an operation raises on another number of images
            return None

    def _candidates(self, node: fx.Node, axes: list[tuple[int, int] | None]) -> list[list[Layout] | None]:
        """For each tensor of a value the layouts that its shape allows, those of the inputs first."""
        inputs = [layout for n in self._data_inputs(node) for layout in self.layouts[n] if layout]
        splits = [(layout.outer, layout.inner) for layout in inputs]
        return [
            None
            if axis is None
            else [
                Layout(axis[0], outer, inner)
                for outer, inner in dict.fromkeys([*splits, *factors(axis[1])])
                if outer * inner == axis[1]
            ]
            for axis in axes
        ]

    def _layouts_of(
        self, full: Any, halves: list[Any] | None, candidates: list[list[Layout] | None]
    ) -> list[Layout | None] | None:
        """The layouts in which the halves are what the whole is; None where there is none."""
        if halves is None:
            _refuse_values_without_images(candidates)
            return None
        made: list[Layout | None] = []
        parts = [tensors_of(half) for half in halves]
        for whole, one, two, possible in zip(tensors_of(full), *parts, candidates, strict=True):
            if possible is None:
                if not (equal(whole, one) and equal(whole, two)):
                    raise MeetError(_ALL_GO_IN)
                made.append(None)
                continue
            fits = (lay for lay in possible if all(equal(lay.half(whole, i), h) for i, h in ((0, one), (1, two))))
            made.append(next(fits, None))
            if made[-1] is None:
                _refuse_values_without_images(candidates)
                return None
        return made

    def _random_layouts(self, node: fx.Node, axes: list[tuple[int, int] | None]) -> list[Layout | None] | None:
        """The same of a node that draws numbers: with other values for one model the other's stay as they are."""
        runs = [self._with_other_values(node, which, seed) for seed in range(SEEDS) for which in (0, 1)]
        made: list[Layout | None] = []
        for k, possible in enumerate(self._candidates(node, axes)):
            pairs = [(which, same[k], other[k]) for which, same, other in runs]
            if possible is None:
                if not all(equal(same, other) for _, same, other in pairs):
                    raise MeetError(_ALL_GO_IN)
                made.append(None)
                continue
            fits = (
                lay for lay in possible if all(equal(lay.half(s, 1 - w), lay.half(o, 1 - w)) for w, s, o in pairs)
            )
            made.append(next(fits, None))
            if made[-1] is None:
                return None
        return made

    def _with_other_values(self, node: fx.Node, which: int, seed: int) -> tuple[int, list[Tensor], list[Tensor]]:
        """What a node gives with the same random numbers as it is, and with one model's values changed."""
        torch.manual_seed(seed)
        same = self._value_of(node, lambda n: cloned(self._full(n)))
        torch.manual_seed(seed)
        other = self._value_of(node, lambda n: cloned(self._full_without(n, which)))
        return which, tensors_of(same), tensors_of(other)

    def _is_periodic(self, node: fx.Node) -> bool:
        """Whether what follows from the number of images alone is for three models what it is for each.

        Asked where the code has numbers that the few images of each half do not reach, such as `arange(B) < 16`.
        """
        if node in self.traced.data or node in self.random or node.op == "get_attr":
            return True
        reach = self._reach(node) + 1
        axes = [axis for axis in self._axes(node) if axis is not None]
        if reach <= 2 * HALF or not axes or reach * self._numel(node) > _MOST_VALUES:
            return True
        try:
            one, three = (tensors_of(self._for_images(node, images)) for images in (reach, 3 * reach))
        except Exception:  # whatever an operation raises at sizes that it is not made for
            return True
        return all(
            equal(part, alone)
            for (axis, _), alone, all_of_them in zip(axes, one, three, strict=True)
            for part in all_of_them.chunk(3, axis)
        )

    def _reach(self, node: fx.Node) -> int:
        """The largest whole number in the code of what follows from the number of images."""
        if node not in self.reaches:
            behind = (self._reach(given) for given in node.all_input_nodes if given not in self.traced.data)
            self.reaches[node] = max([*map(abs, whole_numbers(node)), *behind], default=0)
        return self.reaches[node]

    def _numel(self, node: fx.Node) -> int:
        return sum(math.prod(leaf.shape) for leaf in leaves_of(self.traced.values[node]) if isinstance(leaf, Spec))

    def _for_images(self, node: fx.Node, images: int) -> Any:
        """What follows from shapes and weights alone, for so many images."""
        return self._without_pixels(node, images, lambda n: self._for_images(n, images))

    # Values.

    def _full(self, node: fx.Node) -> Any:
        """A node's value for two models' images: computed, or random where a layer with weights makes it."""
        if node not in self.full:
            if node not in self.traced.data:
                self.full[node] = self._without_pixels(node, 2 * HALF, self._full)
            elif self._is_made_up(node):
                self.full[node] = self._made_up(node)
            else:
                self.full[node] = self._value_of(node, lambda n: cloned(self._full(n)))
                self._settle(node)
        return self.full[node]

    def _is_made_up(self, node: fx.Node) -> bool:
        return node.op in ("placeholder", "call_module") or self.listed.verdict(node).how == "per model"

    def _settle(self, node: fx.Node) -> None:
        """Forget the values of a node's inputs that no other node can ask for."""
        rest = [node]
        while rest:
            settled = rest.pop()
            self.settled.add(settled)
            for given in settled.all_input_nodes:
                users = (user for user in given.users if user in self.traced.readers and user.op != "output")
                if given in self.traced.data and self.settled.issuperset(users):
                    self.full.pop(given, None)
                    rest.extend([given] if given not in self.settled else [])

    def _made_up(self, node: fx.Node) -> Any:
        """Random values of a node's shapes and dtypes."""

        def random_values(one: Spec, two: Spec) -> Tensor:
            shape = shape_for(one, two, 2 * HALF)
            # The family may have another dtype than when it was traced.
            dtype = self.like.dtype if one.dtype == self.traced.image.dtype else one.dtype
            if not dtype.is_floating_point:
                return torch.randint(0, 2, shape, device=self.like.device).to(dtype)
            return torch.randn(shape, dtype=torch.float32, device=self.like.device).to(dtype)

        return mapped_pair(self.traced.values[node], self.second[node], random_values)

    def _half(self, node: fx.Node, which: int) -> Any:
        """A node's value for one model's images."""
        if node in self.traced.data:
            return halved(self._full(node), self.layouts[node], which)
        full = self._full(node)
        if node in self.random:  # drawn for all images at once where models share a batch
            axes = iter(self._axes(node))
            layouts = [Layout(axis[0], 1, axis[1]) if axis else None for axis in axes]
            return halved(full, layouts, which)
        if node not in self.halves:
            self.halves[node] = self._without_pixels(node, HALF, lambda n: self._half(n, 0))
        return self.halves[node]

    def _full_without(self, node: fx.Node, which: int) -> Any:
        """A node's value for two models' images, one of which has the other's."""
        if node not in self.traced.data:
            return self._full(node)
        layouts = iter(self.layouts[node])

        def swapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or (layout := next(layouts)) is None:
                return leaf
            changed = leaf.clone(memory_format=torch.contiguous_format)
            models = layout.models(changed)
            models[which].copy_(models[1 - which].clone())
            return changed

        return mapped(self._full(node), swapped, tensors=True)

    def _without_pixels(self, node: fx.Node, batch: int, of: Callable[[fx.Node], Any]) -> Any:
        """A value that follows from shapes, weights or random numbers alone, for so many images."""

        def given(n: fx.Node) -> Any:
            if n in self.traced.data:  # of which only the shape is asked
                return mapped_pair(
                    self.traced.values[n],
                    self.second[n],
                    lambda one, two: torch.empty(
                        shape_for(one, two, batch), dtype=self._dtype(one), device="meta"
                    ),
                )
            return of(n)

        out, draws = self._drawing(lambda: self._value_of(node, given))
        if draws or any(n in self.random for n in node.all_input_nodes):
            self.random.add(node)
        return self.like.device if isinstance(out, torch.device) else out

    def _dtype(self, spec: Spec) -> torch.dtype:
        return self.like.dtype if spec.dtype == self.traced.image.dtype else spec.dtype

    def _value_of(self, node: fx.Node, given: Callable[[fx.Node], Any]) -> Any:
        """Run one node; for one that changes a value in place, that value afterwards."""
        if node.op == "get_attr":
            return attribute(self.net, str(node.target))
        args: Any = thaw(mapped(node.args, given))
        kwargs: Any = thaw(mapped(node.kwargs, given))
        with torch.device(self.like.device):
            if node.op == "call_module":
                return self._call(self._layer(str(node.target)), args, kwargs)
            if node.op == "call_method":
                out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                target: Any = node.target
                out = target(*args, **kwargs)
        return args[0] if out is None and writes_in_place(node) else out

    def _call(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a copy of a layer; note whether it changes what it holds."""
        before = [buffer.clone() for buffer in layer.buffers()]
        out = layer(*args, **kwargs)
        after = list(layer.buffers())
        self.changes = len(before) != len(after) or not all(map(torch.equal, before, after))
        return out

    def _layer(self, target: str) -> nn.Module:
        """A copy of a layer, in the graph's mode."""
        layer = silence_hooks(copy_model(self.net.get_submodule(target)))
        modes = dict(self.traced.module.get_submodule(target).named_modules())
        for path, part in layer.named_modules():
            part.training = modes[path].training
        return layer


def _refuse_values_without_images(candidates: list[list[Layout] | None]) -> None:
    """Refuse a node that cannot be run on fewer images and makes a value without them."""
    if any(possible is None for possible in candidates):
        raise MeetError(_ALL_GO_IN)
