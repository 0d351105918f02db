"""model + cuts or budgets -> DetachableNet: traced, planned, built, and compared with the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from detachnet.errors import CutError, TraceError
from detachnet.surgery.choice import choose_models
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.generators import generators_kept, generators_of
from detachnet.surgery.graph import TracedModel, UnrunnableError
from detachnet.surgery.hints import hooks_of_parameters
from detachnet.surgery.modules import copy_model, unwrap
from detachnet.surgery.outside import Outside
from detachnet.surgery.plan import Cuts, DetachPlan, Head, Norm
from detachnet.surgery.planning import make_plan
from detachnet.surgery.proof import Check, UnlikeError, prove
from detachnet.surgery.routes import MOST_MODELS, narrow_models
from detachnet.surgery.stepdown import Stem, StepDownBuilder
from detachnet.surgery.trace import outermost, trace, without_values
from detachnet.surgery.tracer import Leaves
from detachnet.surgery.whole import is_soft
from detachnet.surgery.widths.storing import Narrowing


def make_detachable(
    model: nn.Module,
    cuts: Cuts | None = None,
    input_size: tuple[int, ...] | None = None,
    *,
    sub_models: int | Literal["auto"] | Sequence[float] | None = None,
    widths: Sequence[float] | None = None,
    costs: Mapping[str, float] | None = None,
    importance: Mapping[str, float] | None = None,
    norm: Norm = "private",
    head: Head = "shared",
    stepdown: str | Stem | StepDownBuilder = "conv",
    example_input: Tensor | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
    check: Check = "full",
) -> DetachableNet:
    """Turn a CNN into a family of networks that share its weights.

    A sub-model leaves out spans of the network. For a span inside nothing stands where both its ends have the same
    shape, else a convolution. One that begins at the image is a cut: everything up to and including it is dropped,
    and a step-down convolution sized from the traced shapes takes in the image. A sub-model can have fewer
    filters, too: its layers read parts of the base-model's. The model itself is copied and left as it is, the
    random state too.

    Args:
        model: Any CNN with one image input, on any device.
        cuts: Names of modules or traced nodes, front to back (`find_cuts` lists them); a dict from own names of
            sub-models to them or to a `SubModel(drop=["a:b", …], width=0.5)`; a number of sub-models, or
            `"auto"` for two, spread evenly in MACs; or fractions of the base-model's MACs to keep, such as
            `[0.7, 0.3]`.
        input_size: Shape of one image, `(C, H, W)`; by default what the model declares.
        sub_models: Instead of cuts a number of sub-models, `"auto"` for two, or fractions of the base-model's MACs
            that they may have, such as `[0.7, 0.4]`. What each leaves out is chosen: the route that loses least.
        widths: Instead of cuts a sub-model `sub0`, `sub1`, … for each share of the filters, such as `[0.75, 0.5]`:
            short for a dict to `SubModel(width=0.75)` and `SubModel(width=0.5)`.
        costs: What counts instead of MACs when they are chosen, as `measure_segments` gives it.
        importance: What leaving out each span loses when they are chosen, as `span_importance` gives it.
        norm: `private` gives each sub-model its own batch norms; `shared` is the paper's.
        head: `private` gives each sub-model its own copy of the last layer with weights, that of its
            main output.
        stepdown: `conv`; `stem` or a `detachnet.Stem`, several convolutions with norms; `identity`, the flattened
            image itself where the feature has its size; or a function `(image shape, feature shape) -> module`.
        example_input: A batch `(B, ...)` instead of `input_size`.
        leaf_modules: Classes of modules to keep whole, as those that cannot be traced must be, or names of single
            modules.
        leaf_functions: Functions to keep whole, which a traced module calls by a global name.
        check: What is compared with the model on a few random images, in both modes, and of joint passes with
            separate ones: `full`, outputs, gradients and buffers; `outputs`, no gradients; or `none`.

    Raises:
        TraceError: The model cannot be traced, does not run at that size, or its trace is not the model.
        CutError: A cut is unknown, crossed by another path, repeated, out of order or at the output.
        StepDownError: The feature map is larger than the image, or of a rank no step-down is known for.
        WidthError: A width is out of range, given twice, of unknown filters or leaves none out, or `norm="shared"`
            cannot serve it.

    Examples:
        >>> net = detachnet.make_detachable(model, sub_models=[0.7, 0.4], input_size=(3, 32, 32))
        >>> net = detachnet.make_detachable(model, widths=[0.75, 0.5], input_size=(3, 32, 32))
        >>> net = detachnet.make_detachable(model, cuts=["features.6", "features.20"], input_size=(3, 32, 32))
        >>> net(images, which="sub1").shape
        torch.Size([8, 10])

    Source: Fuengfusin & Tamukoh, JRNAL 8(1), 2021; the rewriting of graphs and private norms are ours.
    """
    _check_options(norm, head, stepdown, check)
    if sum(given is not None for given in (cuts, sub_models, widths)) != 1:
        raise CutError("give either cuts, sub_models or widths", hint="make_detachable(model, sub_models=2)")
    if sub_models is None and (costs is not None or importance is not None):
        raise CutError("costs and importance are for choosing sub_models; cuts and widths are chosen already")
    cuts = cuts if widths is None else narrow_models(widths)
    _check_cuts(cuts)
    model = unwrap(model)
    if isinstance(model, DetachableNet):
        raise CutError(
            f"the model is a family already: {model!r}",
            hint="make_detachable(net.base, ...) makes another one of its base-model",
        )
    entry = stepdown if isinstance(stepdown, str | Stem) else "conv"

    def traced(leaves: Leaves) -> TracedModel:
        return trace(model, input_size, example_input, leaves)

    def planned(narrowing: Narrowing) -> tuple[DetachPlan, dict[str, nn.Module]]:
        traced = narrowing.traced
        chosen = choose_models(traced, sub_models, entry, costs, importance) if sub_models is not None else cuts
        assert chosen is not None
        with torch.random.fork_rng(devices=[]):
            return make_plan(traced, chosen, norm, stepdown, head, narrowing)

    leaves = Leaves.given(leaf_modules, leaf_functions)
    with torch.inference_mode(False), generators_kept(generators_of(model)), Outside(model).kept():
        return _family(model, traced, planned, leaves, check)


def _family(
    model: nn.Module,
    traced_with: Callable[[Leaves], TracedModel],
    planned: Callable[[Narrowing], tuple[DetachPlan, dict[str, nn.Module]]],
    leaves: Leaves,
    check: Check,
) -> DetachableNet:
    """Trace, plan, build and compare; again where a module turns out to be better kept whole, or open."""
    whole: dict[str, str] = {}
    refusal: UnlikeError | None = None
    while True:
        try:
            traced = traced_with(leaves)
            narrowing = Narrowing(traced, model)
            plan, bridges = planned(narrowing)
        except CutError as error:
            inside = [path for path in traced.whole if f"{error.node}".startswith(f"{path}.")]
            if inside and is_soft(traced.whole[inside[0]]) and refusal is None:
                leaves = leaves.opening(inside[0])
                continue
            raise refusal or error from None
        except UnrunnableError as error:
            raise refusal or without_values(error, model, traced.eval.image) from None
        except TraceError as error:
            raise refusal or error from None
        net = DetachableNet(copy_model(model), plan, bridges, traced, narrowing)
        try:
            proof = prove(net, check)
        except UnlikeError as error:
            refusal = refusal or error
            if error.owner in leaves.paths:
                raise error from None
            if not error.owner:
                raise refusal from None
            whole[error.owner], leaves = error.said, traced.leaves.with_paths([error.owner])
            continue
        net.check = check
        hints = (*plan.hints, *proof.hints, *hooks_of_parameters(model))
        kept = outermost(whole | dict(plan.whole))
        net.plan = net.plan.model_copy(update={"checked": proof.checked, "hints": hints, "whole": kept})
        return net


def _check_cuts(given: Any) -> None:
    """Refuse more sub-models than any network has, and names that are none.

    Raises:
        CutError: There are such.
    """
    count = given if isinstance(given, int) else len(given) if hasattr(given, "__len__") else 0
    if count > MOST_MODELS and not isinstance(given, str):
        raise CutError(f"cuts asks for {count} sub-models; at most {MOST_MODELS} are made")
    if isinstance(given, Mapping):
        for key in given:
            if not isinstance(key, str):
                raise CutError(f"cuts has a sub-model with the name {key!r}; a name is a string")


def _check_options(norm: str, head: str, stepdown: str | Stem | StepDownBuilder, check: str) -> None:
    """Refuse what `make_detachable` does not know.

    Raises:
        CutError: There is such.
        TraceError: `check` is such.
    """
    if norm not in ("private", "shared"):
        raise CutError(f"norm is 'private' or 'shared', not {norm!r}")
    if check not in get_args(Check):
        raise TraceError(f"check is 'full', 'outputs' or 'none', not {check!r}")
    if head not in ("private", "shared"):
        raise CutError(f"head is 'private' or 'shared', not {head!r}")
    known = stepdown in ("conv", "stem", "identity") if isinstance(stepdown, str) else callable(stepdown)
    is_class = isinstance(stepdown, type) and issubclass(stepdown, Stem)
    if is_class or not (known or isinstance(stepdown, Stem)):
        raise CutError(
            "stepdown is 'conv', 'stem', 'identity', a Stem or a function "
            f"(image shape, feature shape) -> module, not {stepdown!r}"
        )
