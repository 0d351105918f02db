"""family -> what was checked of it: the traced network is the network, and joint passes are separate ones.

A family is compared with its model on a few random images, in both modes, with the same random numbers: what a
trace has lost shows in the outputs, the gradients or the buffers. All of it runs on copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import TraceError
from detachnet.surgery.contents import content
from detachnet.surgery.difference import (
    close,
    difference,
    first_difference,
    graph_outputs,
    other_buffer,
    other_gradient,
)
from detachnet.surgery.hints import (
    left_out,
    left_out_hooks,
    norms_not_run,
    of_a_single_image,
    sums_to_one,
    unused_norms,
)
from detachnet.surgery.modules import attribute, random_states_kept, weight_of
from detachnet.surgery.passes import Pass, Passes, is_large
from detachnet.surgery.plan import BASE
from detachnet.surgery.rewrite import build_view
from detachnet.surgery.tracer import PREFIX
from detachnet.surgery.turns import Turns
from detachnet.surgery.variables import OF_MODULES, is_users

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet

Check = Literal["full", "outputs", "none"]
JOINT_MACS = 4e9
"""MACs of the base-model up to which joint passes are compared in training mode."""
_SAME = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Difference between a model and its base view, relative to the largest value, that rounding explains."""
_JOINT = {torch.float64: 1e-5, torch.float32: 3e-2}
"""The same between joint and separate passes, whose operations work on other numbers of images."""
_WITHOUT_SURPRISE = {"None", "_operator", "builtins", "math", "torch", "torchvision", "timm"}
"""Packages where layers and functions are from whose backward passes are those of what they compute."""
_LINEAR_IN_WEIGHTS = ("torch.nn.modules.conv", "torch.nn.modules.linear")


@dataclass(frozen=True)
class Proof:
    """What a comparison found.

    Attributes:
        checked: What the plan says of it; empty where everything was checked and nothing is worth a word.
        hints: What is legal but worth a second thought.
    """

    checked: str = ""
    hints: tuple[str, ...] = ()


def prove(net: DetachableNet, check: Check) -> Proof:
    """Compare a family with its model, and its joint passes with separate ones.

    Args:
        net: The family; left as it is, the random state too.
        check: `full`; `outputs`, no gradients; or `none`.

    Raises:
        TraceError: They differ, with the first module in which they do.
    """
    if check == "none":
        return Proof("nothing was compared with the model")
    like = weight_of(net)
    if like.is_meta:
        return Proof("nothing was compared with the model, which has no weights yet")
    large = is_large(net)
    quiet = warnings.catch_warnings()
    with quiet, random_states_kept(like.device), torch.autocast(like.device.type, enabled=False):
        warnings.simplefilter("ignore")  # what a layer has to say of these passes is none of the user's concern
        prover = _Prover(net, check, like.dtype, 2 if large else 4)
        if not large and like.device.type != "mps":
            prover.exact = _Prover(net, check, torch.float64, 4)
        try:
            return prover.run()
        except _CannotRunError as error:
            said = "; ".join([*dict.fromkeys(prover.notes), f"{_missed(prover.compared)} here: {error}"])
            return Proof(said, (*left_out_hooks(net), *left_out(net)))


def _missed(compared: Sequence[bool]) -> str:
    """What was not compared, by the modes in which passes were, where the model fails."""
    if not compared:
        return "nothing was compared with the model, which does not run"
    if not compared[-1]:
        return "only evaluation mode was compared with the model, which does not run in training mode"
    return "no later pass was compared with the model's, which does not run a second time"


class UnlikeError(TraceError):
    """A traced network that is not the model.

    Attributes:
        owner: Path of the module to keep whole; empty if that is the model itself.
        said: Why, in a few words.
    """

    owner: str = ""
    said: str = ""


class _CannotRunError(Exception):
    """The model itself does not run."""


class _Prover:
    """Compares one family on one batch of images."""

    def __init__(self, net: DetachableNet, check: Check, dtype: torch.dtype, images: int) -> None:
        self.net = net
        self.passes = Passes(net, dtype, images)
        self.gradients = frozenset(name for name, _ in net.named_parameters() if check == "full")
        self.of_joint = self.gradients & _telling(net) if self.passes.one_image else self.gradients
        """The parameters whose gradients are compared, and those of joint passes."""
        self.dtype, self.notes = dtype, list[str]()
        self.compared: list[bool] = []
        """The modes that have been compared."""
        self.exact: _Prover | None = None
        """Compares joint passes in float64 instead; a model may ask for its own dtype, as autocast does."""

    def run(self) -> Proof:
        """All comparisons."""
        hints = (*left_out_hooks(self.net), *left_out(self.net), *norms_not_run(self.net))
        hints = (*hints, *of_a_single_image(self.net))
        for training in (False, True):
            expected = self._model_pass(training)
            found = self._view_pass(training, (BASE,), self.gradients)
            self._compare_with_model(training, expected, found)
            if training:
                hints = (*hints, *self._shared_state(found))
            if not training and sums_to_one(expected.outputs):
                hints = (*hints, "in evaluation mode it returns probabilities; what takes logits normalizes again")
            self._compare_joint_exactly(training, found)
            self.compared.append(training)
        self._compare_later_passes()
        if not self.gradients:
            self.notes.append("no gradients were compared with the model's")
        notes = [*dict.fromkeys(self.notes), *self._coupled()]
        return Proof("; ".join(notes), hints)

    # Passes.

    def _model_pass(self, training: bool) -> Pass:
        """The model as it is, with its hooks."""
        one_image = self.passes.one_image and not training
        try:
            made = self.passes.run(lambda net, x: net.base(x), self.passes.fresh(), training, self.gradients)
            if not one_image or all(out.isfinite().all() for out in made.outputs):
                return made
        except Exception as error:  # whatever a user's model raises
            if not one_image:
                raise _CannotRunError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        self.passes.one_image = False  # which has no spread, and an axis that some models drop
        return self._model_pass(training)

    def _view_pass(self, training: bool, models: tuple[str, ...], of: frozenset[str]) -> Pass:
        which: str | tuple[str, ...] = models[0] if len(models) == 1 else models
        try:
            return self.passes.run(lambda net, x: net(x, which=which), self.passes.fresh(), training, of)
        except Exception as error:  # whatever an operation raises
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            if len(models) == 1:
                owner = getattr(error, "node", None) or ""
                raise self._refusal(
                    f"it fails in {_mode(training)} mode",
                    what,
                    owner.rpartition(".")[0],
                    "it changes weights in place",
                ) from error
            raise self._joint_refusal(f"it fails in {_mode(training)} mode", what) from error

    # Comparisons.

    def _compare_with_model(self, training: bool, expected: Pass, found: Pass) -> None:
        """Refuse a base view that is not the model."""
        bound = _SAME.get(self.dtype, 3e-2)
        if not self._same_outputs(expected, found, bound):
            if expected.draws and self._draws_in_another_order(training, expected, bound):
                self.notes.append(f"in {_mode(training)} mode it draws its random numbers in another order")
                return
            again = self._model_pass(training)
            if not self._same_outputs(expected, again, bound):
                if self._same_outputs(found, self._view_pass(training, (BASE,), frozenset()), bound):
                    raise self._other_outputs(training)
                self.notes.append(f"in {_mode(training)} mode the model gives other outputs each time")
                return
            raise self._other_outputs(training)
        if name := other_gradient(expected.gradients, found.gradients, bound):
            raise self._other_gradients(name, expected.gradients[name], found.gradients[name])
        unused = tuple(f"{target}." for target in unused_norms(self.net.traced(training)))
        own = {
            name: value
            for name, value in expected.buffers.items()
            if name.startswith(PREFIX) and not name.startswith(unused)
        }
        if name := other_buffer(own, found.buffers, bound):
            owner = name.removeprefix(PREFIX).rpartition(".")[0]
            if any("checkpointing" in reason.what for reason in self.net._derived.lost):
                raise TraceError(
                    f"the traced {self.net.plan.model} is not the model: that trains {owner!r} twice in each pass",
                    what="checkpointing runs what it leaves out once more, and a batch norm there counts twice",
                    hint="switch it off: model.set_grad_checkpointing(False), or as your model has it",
                )
            raise self._refusal(
                f"in {_mode(training)} mode its buffer {name.removeprefix(PREFIX)!r} becomes another value",
                what="the forward pass assigns it, or changes it by what a trace does not hold",
                owner=owner,
                short=f"its buffer {name.removeprefix(PREFIX)!r} becomes another value",
            )

    def _compare_later_passes(self) -> None:
        """Refuse a base view that is the model in a first pass only, where one leaves what later ones may read."""
        left = [
            *self.net._derived.filled.items(),
            *(("", reason) for reason in self.net._derived.lost if reason.counts),
        ]
        if not left:
            return
        bound, copies = _SAME.get(self.dtype, 3e-2), (self.passes.fresh(), self.passes.fresh())
        for i, training in enumerate((True, True, False, False)):
            runs = (lambda net, x: net.base(x), lambda net, x: net(x, which=BASE))
            try:
                one, two = (
                    self.passes.run(run, net, training, frozenset()) for run, net in zip(runs, copies, strict=True)
                )
            except Exception as error:  # whatever a user's model raises
                raise _CannotRunError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
            if self._same_outputs(one, two, bound):
                continue
            if i == 0:  # which has been judged
                self.notes.append("a second pass was not compared")
                return
            owner, reason = left[0]
            raise self._refusal("its values are others in a later pass", reason.what, owner, str(reason))

    def _draws_in_another_order(self, training: bool, expected: Pass, bound: float) -> bool:
        """Whether the trace gives what the model does in the order of the trace; views draw when they need to."""
        images = self.passes.images[: len(expected.outputs[0])] if expected.outputs else self.passes.images
        outputs = graph_outputs(self.passes.fresh(), self.net.traced(training), training, images)
        return self._same_outputs(expected, Pass(outputs, {}, {}, True, self.passes.root), bound)

    def _compare_joint_exactly(self, training: bool, base: Pass) -> None:
        """Compare joint passes in float64 where the model is small and works in it, else as they are."""
        prover = self.exact or self
        if self.exact is not None:
            try:
                base = self.exact._view_pass(training, (BASE,), self.exact.of_joint)
            except TraceError:  # some models work in one dtype only
                prover = self
        prover._compare_joint(training, base)
        self.notes += prover.notes if prover is not self else []

    def _compare_joint(self, training: bool, base: Pass) -> None:
        """Refuse joint passes that are not separate ones."""
        source, names = self.net._derived.of_base[training], self.net.names
        source.find_coupling(self.net)
        if training and self.net.plan[BASE].macs > JOINT_MACS:
            self.notes.append("joint passes were compared in evaluation mode only, for the size of the model")
            return
        if len(names) < 2:
            return
        if base.draws:
            self.passes.switch_off()
            base = self._view_pass(training, (BASE,), self.of_joint)
        if base.draws:
            changed = [name for name, _ in self.passes.root.named_parameters() if name in base.buffers]
            if training and changed:
                said = f"the forward pass changes the weight {changed[0].removeprefix(PREFIX)!r}"
                raise self._joint_refusal(said, "each of them would change it once more")
            self.notes.append(
                f"in {_mode(training)} mode joint passes were not compared: they draw random numbers"
            )
            return
        try:
            self._compare_passes(training, base)
        except TraceError:
            if training or not self.passes.one_image:
                raise
            self.passes.one_image = False  # of which some models drop the axis
            self._compare_passes(training, self._view_pass(training, (BASE,), self.of_joint))

    def _compare_passes(self, training: bool, base: Pass) -> None:
        """Refuse a joint pass that gives anything else than the base-model's pass and those of the others."""
        joint = self._view_pass(training, self.net.names, self.of_joint)
        apart = self._apart(training, base)
        bound = _JOINT.get(self.dtype, 0.2)
        wrong = next(
            (
                i
                for i, pair in enumerate(zip(apart.outputs, joint.outputs, strict=True))
                if not close(*pair, bound)
            ),
            None,
        )
        what = ""
        if wrong is not None:
            what = f"outputs differ by {difference(apart.outputs[wrong], joint.outputs[wrong]):.1e}"
        elif name := other_gradient(apart.gradients, joint.gradients, bound):
            what = f"the gradient of {name!r} is another"
        elif name := other_buffer(apart.buffers, joint.buffers, bound):
            what = f"the buffer {name!r} becomes another value"
        if what:
            raise self._joint_refusal(f"in {_mode(training)} mode they give other results than alone", what)

    def _apart(self, training: bool, base: Pass) -> Pass:
        """All models one after another."""
        start = self.passes.fresh().train(training)

        def run(net: DetachableNet, x: Tensor) -> list[Any]:
            outputs, turns = [], Turns(net, net.names, start)
            for name in net.names[1:]:
                with turns.of(name):
                    outputs.append(net(x.clone(), which=name))
            return outputs

        subs = self.passes.run(run, base.net, training, self.of_joint)  # what the base-model has left is there
        both = {name: _sum(base.gradients[name], gradient) for name, gradient in subs.gradients.items()}
        return Pass([*base.outputs, *subs.outputs], both, subs.buffers, False, base.net)

    def _same_outputs(self, one: Pass, two: Pass, bound: float) -> bool:
        pairs = zip(one.outputs, two.outputs, strict=False)
        return len(one.outputs) == len(two.outputs) and all(close(*pair, bound) for pair in pairs)

    def _coupled(self) -> list[str]:
        """What was found to join the images of a batch."""
        said: dict[str, None] = {}
        for training in (False, True):
            source = self.net._derived.of_base[training]
            for node, verdict in source.coupling.found.items():
                if verdict.how == "never":
                    said[f"{source.traced.describe(node)} {verdict.why}: the models run one after another"] = None
                elif verdict.how == "per model" and "join" in verdict.why:
                    said[f"{source.traced.describe(node)} {verdict.why} and runs model by model"] = None
        return list(said)

    def _shared_state(self, found: Pass) -> tuple[str, ...]:
        """A hint where sub-models with norms of their own share a buffer, or the like, that training changes."""
        before = dict(self.passes.root.named_buffers(remove_duplicate=False))
        # A buffer that takes another shape is a table made when it is first needed.
        alike = [n for n, v in found.buffers.items() if n in before and _is_like(v, before[n])]
        changed = [n for n in alike if not torch.equal(before[n], found.buffers[n])]
        rest = [
            n for n in changed if not isinstance(self.passes.root.get_submodule(n.rpartition(".")[0]), _BatchNorm)
        ]
        held, now = (_values_held(net.base) for net in (self.passes.root, found.net))
        rest += [f"{PREFIX}{name}" for name, value in now.items() if value != held.get(name, value)]
        if self.net.plan.norm != "private" or not rest:
            return ()
        graphs = [build_view(self.net._derived.sources[name][True], (name,)) for name in self.net.names[1:]]
        read = {
            str(node.target) for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")
        }
        shared = [name for name in rest if any(f"{name}.".startswith(f"{target}.") for target in read)]
        names = ", ".join(repr(name.removeprefix(PREFIX)) for name in shared)
        return (f"all models share {names}, which training changes",) if shared else ()

    # Refusals.

    def _other_outputs(self, training: bool) -> TraceError:
        """The refusal of another output, with the first module that gives one."""
        where = first_difference(
            self.passes.fresh(),
            self.net.traced(training),
            training,
            self.passes.images,
            _SAME.get(self.dtype, 3e-2),
        )
        if where is None:
            return self._refusal(f"in {_mode(training)} mode its outputs are others")
        path, owner = where
        place = f"at {path!r}" if owner == path else f"in front of {path!r}"
        return self._refusal(
            f"in {_mode(training)} mode its values are others from {place} on",
            owner=owner,
            short=f"its values are others in {_mode(training)} mode",
        )

    def _other_gradients(self, name: str, expected: Tensor | None, found: Tensor | None) -> TraceError:
        why = "a function with a backward pass of its own, or autocast"
        if (expected is None) != (found is None):
            why = "the model has none" if expected is None else "the family has none"
            why += ": torch.no_grad, detach, or a function with a backward pass of its own"
        path = name.removeprefix(PREFIX)
        return self._refusal(
            f"the gradient of {path!r} is another",
            what=why,
            owner=path.rpartition(".")[0],
            short="its gradients are others",
        )

    def _joint_refusal(self, said: str, what: str) -> TraceError:
        """A refusal of joint passes."""
        return TraceError(
            f"the models of {self.net.plan.model} cannot share one pass: {said}",
            what=what,
            hint="keep what does it whole (leaf_modules); or check='none', and run the models one at a time",
        )

    def _refusal(self, said: str, what: str = "", owner: str = "", short: str = "") -> TraceError:
        """A refusal that names the module to keep whole."""
        base = self.net.base
        owner = owner if owner in dict(base.named_modules()) else ""
        while owner and _is_plain(base.get_submodule(owner)):
            owner = owner.rpartition(".")[0]
        module = base.get_submodule(owner) if owner else base
        kept = f"leaf_modules=[{owner!r}] keeps it whole"
        if owner in self.net._tracing.leaves.paths:
            kept = f"{owner!r} is kept whole as it is; move what calls it into a module of its own"
        moved = "move that part of forward into a module of its own, which is then kept whole"
        lost = next(iter(self.net._derived.lost), None) if not owner else None
        error = UnlikeError(
            f"the traced {self.net.plan.model} is not the model: {said}",
            what=f"its forward has {lost.what}, which no trace holds" if lost else what,
            where=lost.where if lost and lost.where else f"{owner or 'the model'} ({type(module).__name__})",
            hint=f"{kept if owner else moved}; check='none' takes the trace as it is",
            node=owner or None,
        )
        error.owner, error.said = owner, short or said
        return error


_CONTAINERS = (nn.Sequential.forward, nn.Module.forward)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module only runs its layers, or is a layer that is kept whole anyway; not what has both names.

    Fused layers of torch.ao are containers by their class, with a forward of their own.
    """
    is_alone = next(module.children(), None) is None and isinstance(module, _LAYERS)
    is_container = getattr(type(module), "forward", None) in _CONTAINERS
    return is_alone or is_container or isinstance(module, nn.modules.batchnorm._NormBase)


def _telling(net: DetachableNet) -> set[str]:
    """The parameters that tell whether a joint pass has the gradients of separate ones.

    The gradient of a weight of torch's own convolution or linear layer follows from what goes into the layer and
    what comes back, of which the parameters around it tell, and in the end the base-model's first one. Not where a
    layer is of another's making, which may do anything in its backward pass.
    """
    every = dict(net.named_parameters())
    nodes = [node for traced in net.all_traced(True) for node in traced.graph.nodes]
    layers = [attribute(net, str(node.target)) for node in nodes if node.op == "call_module"]
    owners = [str(type(layer).__module__) for layer in layers]
    owners += [str(getattr(node.target, "__module__", "")) for node in nodes if node.op == "call_function"]
    if not _WITHOUT_SURPRISE.issuperset(owner.partition(".")[0] for owner in owners):
        return set(every)
    plain = {
        id(layer._parameters.get("weight")) for layer in layers if type(layer).__module__ in _LINEAR_IN_WEIGHTS
    }
    skipped = [name for name, parameter in every.items() if name.startswith(PREFIX) and id(parameter) in plain]
    return set(every).difference(skipped[1:])


def _values_held(model: nn.Module) -> dict[str, Any]:
    """What a user's layers hold besides tensors that torch knows of, by name; of tensors among it the mean."""

    def mean_of(value: Any) -> Any:
        return float(value.detach().double().mean()) if isinstance(value, Tensor) and value.numel() else None

    return {
        f"{path}.{name}": content(value, mean_of)
        for path, module in model.named_modules()
        if is_users(type(module).__module__)
        for name, value in vars(module).items()
        if name not in OF_MODULES
    }


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _is_like(one: Tensor, two: Tensor) -> bool:
    return one.is_floating_point() and one.shape == two.shape


def _sum(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one + two
