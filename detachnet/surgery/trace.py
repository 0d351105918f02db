"""module -> TracedModel: the graph of a model, dotted names for its nodes, and what flows along each edge.

A model is traced twice, in training and in evaluation mode, because `self.training` is baked into a trace. Both
traces are made on a copy on the meta device, so the model itself is never run, moved or touched.
"""

from __future__ import annotations

import inspect
import math
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.lazy import LazyModuleMixin

from detachnet.errors import TraceError, nearest
from detachnet.surgery.attributes import attributes_read
from detachnet.surgery.contents import is_variable, own_bases
from detachnet.surgery.generators import generators_kept, generators_of
from detachnet.surgery.graph import Root, TracedGraph, TracedModel, UnrunnableError, writes_in_place
from detachnet.surgery.modules import copy_model, meta_twin, random_states_kept, weight_of
from detachnet.surgery.outside import Outside
from detachnet.surgery.settle import cut_gradients, settle_augmented
from detachnet.surgery.tracer import NO_LEAVES, PREFIX, PROBE_BATCH, Leaves, Spec, Tracer
from detachnet.surgery.variables import OF_MODULES, functions_in, functions_of, names_in, reached_by
from detachnet.surgery.whole import LostError, Reason, hooked
from detachnet.zoo import default_input_size

_ONCE = "a trace would hold the answer of one device and one pass"


def trace(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    example_input: torch.Tensor | None = None,
    leaves: Leaves = NO_LEAVES,
    others: Mapping[bool, Collection[str]] = MappingProxyType({}),
) -> TracedModel:
    """Trace a model without running or changing it.

    Args:
        model: Any module with one image input, on any device.
        input_size: Shape of one image, `(C, H, W)`. By default what the model declares.
        example_input: A batch `(B, ...)` instead, for inputs of another rank or dtype.
        leaves: Modules and functions to keep whole.
        others: Mode → paths of single modules that are in the other one.

    Raises:
        TraceError: Its forward pass decides by a tensor's values, does not run at that size, or no size is known.
    """
    image = _image_spec(model, input_size, example_input)
    _check_model(model, image, leaves)
    whole: dict[str, str] = {}
    outside = Outside(model)
    with random_states_kept(), generators_kept(generators_of(model)):
        while True:
            try:
                return _traced(model, image, leaves, whole, others, outside)
            except _KeepWholeError as error:
                whole |= error.found
                leaves = leaves.with_paths(error.found)


def without_values(error: UnrunnableError, model: nn.Module, image: Spec) -> TraceError:
    """The same refusal, with another reason where the model itself does run."""
    try:
        copied = copy_model(model)
        copied.eval()
        like = weight_of(copied)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copied(torch.zeros_like(image.example(2), device=like.device))
    except Exception:  # whatever a user's model raises
        return error
    if like.is_meta:
        return error
    return TraceError(
        f"cannot trace {type(model).__name__}: it runs, but not without values: it fails at {error.node}",
        what=str(error.__cause__).splitlines()[0],
        hint="the shapes of what it computes must not depend on values, nor on what an operation raises",
        node=error.node,
    )


class _KeepWholeError(Exception):
    """Modules whose own forward does what a trace loses."""

    def __init__(self, found: Mapping[str, str]) -> None:
        super().__init__(", ".join(found))
        self.found = dict(found)


def _traced(
    model: nn.Module,
    image: Spec,
    leaves: Leaves,
    whole: Mapping[str, str],
    others: Mapping[bool, Collection[str]],
    outside: Outside,
    closely: bool = False,
) -> TracedModel:
    """Trace once in each mode; again where a random state has moved, to hear whether this thread did it."""
    graphs: dict[bool, TracedGraph] = {}
    constants, tracers = dict[str, torch.Tensor](), list[Tracer]()
    found, filled = dict[str, str](), dict[str, Reason]()
    for training in (False, True):
        root = Root(meta_twin(model)).train(training)
        for path in others.get(training, ()):
            root.base.get_submodule(path).training = not training
        tracers.append(tracer := Tracer(leaves, image))
        tracer.watch.closely = closely
        tracer.watch.hooks |= hooked(model)
        with outside.kept():
            graph = _trace_root(tracer, root)
            filled |= tracer.watch.filled()
        if training and graph is not None:  # what answers need not be computed for in evaluation is left out there
            tracer.watch.called_for_effect(root)
        found |= {path: str(reason) for path, reason in tracer.watch.found.items()}
        if graph is not None:
            graphs[training] = TracedGraph(root, graph, _flatten(tracer.calls), image, tracer.calls)
            constants |= _take_constants(root, graph, "train" if training else "eval", constants)
    if found:
        raise _KeepWholeError(found)
    if not closely and any(tracer.watch.moved for tracer in tracers):
        return _traced(model, image, leaves, whole, others, outside, closely=True)
    lost = _lost(model, tracers)
    outer = outermost(whole)
    for made in graphs.values():
        made.whole = outer
    opened = {path: module for tracer in tracers for path, module in tracer.watch.opened.items()}
    written = {path: {name for t in tracers for name in t.watch.written_to(path)} for path in opened}
    asked = _asked(model, tracers)
    return TracedModel(
        *(graphs[True], graphs[False], constants, type(model).__name__, leaves),
        whole=outer,
        lost=lost,
        read=attributes_read(opened, written),
        of_layers=_read_of_layers(asked, opened),
        filled=filled,
        modal=tuple(path for path, (_, names) in asked.items() if "training" in names),
    )


def _asked(model: nn.Module, tracers: Sequence[Tracer]) -> dict[str, tuple[nn.Module, set[str]]]:
    """Path of a module that a forward pass has asked for attributes → the module, and their names."""
    found: dict[str, tuple[nn.Module, set[str]]] = {}
    for tracer in tracers:
        twins = {path: id(twin) for path, twin in tracer.root.get_submodule(PREFIX.rstrip(".")).named_modules()}
        for path, module in model.named_modules():
            if names := tracer.watch.asked.get(twins.get(path, 0)):
                found.setdefault(path, (module, set()))[1].update(names)
    return found


def _read_of_layers(
    asked: Mapping[str, tuple[nn.Module, set[str]]], opened: Mapping[str, nn.Module]
) -> dict[str, frozenset[str]]:
    """Path of a layer → the names by which a forward pass around it has read what it holds; not its own names."""
    found = {}
    for path, (module, names) in asked.items():
        is_users = not type(module).__module__.startswith("torch.")
        if not (isinstance(module, torch.jit.ScriptModule) or (is_users and path in opened)):
            of_class = {n for kind in own_bases(type(module)) for n, v in vars(kind).items() if is_variable(n, v)}
            held = names & (vars(module).keys() | of_class) - {*OF_MODULES, "forward"}
            found[path] = frozenset(name for name in held if is_users or name[:1] != "_")
    return found


def _lost(model: nn.Module, tracers: Sequence[Tracer]) -> tuple[Reason, ...]:
    """What the model's own forward pass has that a trace loses.

    Raises:
        TraceError: It decides something.
    """
    lost = {reason.what: reason for tracer in tracers for reason in tracer.watch.lost}
    for reason in lost.values():
        if reason.decides:
            raise TraceError(
                f"cannot trace {type(model).__name__}: its own forward pass has {reason.what}",
                what=_ONCE,
                where=reason.where,
                hint="move that line into the forward of a module of its own: that is kept whole",
            )
    return tuple(lost.values())


def outermost(whole: Mapping[str, str]) -> dict[str, str]:
    """What is kept whole, without what is inside of that."""
    return {path: why for path, why in whole.items() if not any(path.startswith(f"{other}.") for other in whole)}


def _check_model(model: nn.Module, image: Spec, leaves: Leaves) -> None:
    """Refuse what cannot be traced whatever its forward pass does."""
    name, shape = type(model).__name__, ", ".join(map(str, image.shape[1:]))
    for path, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise TraceError(
                f"cannot trace {name}: {path!r} has no shape yet",
                where=f"{path!r} ({type(module).__name__})",
                hint=f"run the model once first: model(torch.zeros(2, {shape}))",
                node=path,
            )
    if any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()]):
        raise TraceError(
            f"cannot trace {name}: its weights were made inside torch.inference_mode()",
            what="such tensors take no gradient and no copy that would",
            hint="make the model outside of it",
        )
    _check_functions(model)
    paths = [path for path, _ in model.named_modules()]
    for given in (*leaves.modules, *leaves.functions):
        if not (isinstance(given, str | type) if given in leaves.modules else callable(given)):
            raise TraceError(
                f"{given!r} cannot be kept whole",
                hint="leaf_modules takes classes and names of modules, leaf_functions functions",
            )
    for path in leaves.paths:
        if path not in paths[1:]:
            raise TraceError(
                f"{name} has no module {path!r} to keep whole",
                hint="leaf_modules takes classes, and names as model.named_modules() has them",
                nearest=nearest(path, paths),
            )
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    keywords = [p.name for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    if len(needed) > 1 or keywords:
        first = f"{needed[0]}={needed[0]}" if needed[0] in keywords else needed[0]
        given = ", ".join([first, *(f"{n}=..." for n in needed[1:])])
        taken = ", ".join(needed) if len(needed) > 1 else f"{needed[0]} by its name only"
        raise TraceError(
            f"cannot trace {name}: a model takes one image, but its forward takes {taken}",
            hint=f"wrap it as self.net in a module: def forward(self, {needed[0]}): return self.net({given})",
        )


def _check_functions(model: nn.Module) -> None:
    """Refuse a function in place of a method that holds parts of the model: a copy would go on using those.

    Raises:
        TraceError: There is one.
    """
    parts: dict[int, str] = {id(module): path or "the model itself" for path, module in model.named_modules()}
    parts |= {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for path, module in model.named_modules():
        for name, function in functions_in(module):
            used = name == "forward" or any(name in names_in(method) for method in functions_of(module))
            held = next((parts[id(value)] for value in reached_by(function) if id(value) in parts), "")
            if used and held:
                place = f"{path}.{name}".lstrip(".")
                raise TraceError(
                    f"cannot copy {type(model).__name__}: {place!r} is a function that holds {held!r}",
                    what="a family has a copy of the model; that function would go on using the original",
                    hint="let it take the module as self: module.forward = types.MethodType(function, module)",
                    node=path or None,
                )


def _trace_root(tracer: Tracer, root: Root) -> fx.Graph | None:
    """Run the tracer; turn whatever the forward pass raises into a TraceError with the user's source line.

    Nothing comes of a failure behind something for which a module is kept whole.
    """
    try:
        graph = _inline_named_tuples(tracer.trace(root))
        cut_gradients(tracer, graph)
        settle_augmented(tracer, graph)
        _copy_what_is_written(root, graph)
        return graph
    except Exception as error:
        tracer.watch.look()
        if tracer.watch.found or (tracer.watch.moved and not tracer.watch.closely):
            return None
        raise _refusal(tracer, root, error) from error


def _refusal(tracer: Tracer, root: Root, error: Exception) -> TraceError:
    """Why a forward pass cannot be traced, and what to do about it."""
    lost = [reason for reason in tracer.watch.lost if reason.decides or isinstance(error, LostError)]
    if lost:
        return TraceError(
            f"cannot trace {type(root.base).__name__}: in its own forward pass {lost[0].what}",
            what=_ONCE if lost[0].decides else "a trace holds no state that a pass leaves for the next",
            where=lost[0].where,
            hint="move that into the forward of a module of its own: that is kept whole",
        )
    path = (tracer.stack[-1] if tracer.stack else "base").removeprefix(PREFIX)
    owner = root.base if path == "base" else root.base.get_submodule(path)
    decides = isinstance(error, fx.proxy.TraceError | TypeError)
    keep_whole = f"make_detachable(..., leaf_modules=[{type(owner).__name__}]) keeps that module whole"
    backbone = "make its backbone detachable: make_detachable(model.backbone, ...)"
    move = "move the decision out of forward, or into a submodule without children (those are kept whole)"
    if tracer.watch.hooks and isinstance(error, LookupError | AttributeError):
        those = ", ".join(map(repr, tracer.watch.hooks))
        move = f"a trace runs no hooks: take what those of {those} keep from what forward itself computes"
    if isinstance(error, NameError) and ("as a submodule" in str(error) or "not a member" in str(error)):
        return TraceError(
            f"cannot trace {type(root.base).__name__}: {'it' if path == 'base' else repr(path)} has "
            "a layer or a weight that is no part of it",
            where=_source_line(error),
            hint="make it in __init__, as an attribute or in nn.ModuleList, nn.ParameterList or their like",
            node=path,
        )
    return TraceError(
        f"cannot trace {type(root.base).__name__}: the forward pass of "
        f"{'the model' if path == 'base' else repr(path)} ({type(owner).__name__}) "
        f"{'needs values that are not there while tracing' if decides else 'fails'}",
        what=str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__,
        where=_source_line(error),
        hint=backbone if hasattr(root.base, "backbone") else move if path == "base" else keep_whole,
        node=path,
    )


def _take_constants(
    root: Root, graph: fx.Graph, mode: str, of_other_mode: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors the forward pass made from no input, under names of their mode; equal ones of both under one.

    The root keeps only their shape.
    """
    made = {name: t for name, t in vars(root).items() if isinstance(t, torch.Tensor)}
    names, others = dict[str, str](), dict(of_other_mode)
    for name, value in made.items():
        same = next((other for other, t in others.items() if _is_same(t, value)), "")
        names[name] = same or f"{mode}{name}"
        others.pop(same, None)
        setattr(root, names[name], value.to("meta"))
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in names:
            node.target = names[str(node.target)]
    return {names[name]: value for name, value in made.items()}


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same values; without values they are never."""
    if one.is_meta or (one.device, one.dtype) != (other.device, other.dtype):
        return False
    return torch.equal(one, other)


def _copy_what_is_written(root: Root, graph: fx.Graph) -> None:
    """Let each pass write into a copy of its own of a tensor that the forward pass has made."""
    reads: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(vars(root).get(str(node.target)), torch.Tensor):
            reads.setdefault(str(node.target), []).append(node)
    for nodes in reads.values():
        if any(writes_in_place(user) and user.args[0] is node for node in nodes for user in node.users):
            with graph.inserting_after(nodes[0]):
                copied = graph.call_method("clone", (nodes[0],))
            for node in nodes:
                for user in [user for user in node.users if user is not copied]:
                    user.replace_input_with(node, copied)


def _inline_named_tuples(graph: fx.Graph) -> fx.Graph:
    """Make a named tuple of outputs (auxiliary heads) part of the output, not a node that joins its fields."""
    for node in list(graph.nodes):
        is_tuple = isinstance(node.target, type) and issubclass(node.target, tuple)
        if is_tuple and all(user.op == "output" for user in node.users):
            fields = node.target(*node.args, **node.kwargs)
            for user in list(node.users):
                user.args = _replace(user.args, node, fields)
            graph.erase_node(node)
    return graph


def _replace(args: Any, node: fx.Node, value: Any) -> Any:
    return map_aggregate(args, lambda leaf: value if leaf is node else leaf)


def _source_line(error: BaseException) -> str:
    """File, line and text of the innermost frame that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _image_spec(model: nn.Module, input_size: tuple[int, ...] | None, example_input: torch.Tensor | None) -> Spec:
    """The input's shape at PROBE_BATCH and its dtype, that of the model's weights."""
    if not isinstance(example_input, torch.Tensor | None):
        raise TraceError(f"example_input is a batch of images, a tensor, not {type(example_input).__name__}")
    if example_input is not None:
        return Spec((PROBE_BATCH, *example_input.shape[1:]), example_input.dtype)
    if isinstance(input_size, torch.Tensor):
        raise TraceError(
            "input_size is the shape of one image, (C, H, W), not a tensor",
            hint=f"input_size={tuple(input_size.shape[1:])}, or example_input=that batch",
        )
    if not (input_size is None or isinstance(input_size, tuple | list)):
        raise TraceError(f"input_size is the shape of one image, (C, H, W), not {input_size}")
    size = tuple(input_size) if input_size is not None else default_input_size(model)
    if size is None:
        raise TraceError(
            f"the image size of {type(model).__name__} is not known",
            hint="pass input_size=(C, H, W), for example input_size=(3, 224, 224)",
        )
    if not size or any(not isinstance(n, int) or n < 1 for n in size) or math.prod(size) >= 1 << 40:
        raise TraceError(f"input_size is the shape of one image, (C, H, W), not {size}")
    declared = default_input_size(model)
    if declared is not None and len(size) == len(declared) + 1 and size[1] == declared[0]:
        raise TraceError(
            f"input_size is the shape of one image, (C, H, W), not of a batch, {size}",
            hint=f"input_size={size[1:]}",
        )
    like = weight_of(model)
    return Spec((PROBE_BATCH, *size), like.dtype if like.is_floating_point() else torch.float32)


def _flatten(calls: dict[str, list[fx.Node]]) -> dict[str, fx.Node]:
    """`path`, `path_1`, … for the first, second, … time a name occurs; real names win over made-up ones."""
    names = {path: nodes[0] for path, nodes in calls.items()}
    for path, nodes in calls.items():
        for i, node in enumerate(nodes[1:], start=1):
            name = f"{path}_{i}"
            while name in names:
                name += "_"
            names[name] = node
    return names
