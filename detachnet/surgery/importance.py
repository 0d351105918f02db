"""Trained model + held-out images -> what leaving out each of its spans loses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detachnet.errors import CutError
from detachnet.losses import logits
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.making import make_detachable
from detachnet.surgery.modules import copy_for, evaluating, weight_of
from detachnet.surgery.routes import SubModel
from detachnet.surgery.spans import find_spans


def span_importance(model: nn.Module, images: Tensor, target: Tensor, *, batch: int = 250) -> dict[str, float]:
    """Mean cross entropy that a trained model gains when a span is left out, each of its spans alone.

    Only spans that nothing stands for are measured: a new layer in place of one would be untrained.

    Args:
        model: A trained classifier; it is left as it is, and run where it is, in evaluation mode.
        images: Normalized images that it was not trained on, `(N, C, H, W)`.
        target: Their classes, `(N,)`.
        batch: Images per run.

    Returns:
        Name of a span, as `find_spans` lists them, to nats; negative where leaving it out helps.

    Raises:
        CutError: The model has no such span, or there are no images, or not as many as classes.

    Examples:
        >>> lost = detachnet.span_importance(trained, images, target)
        >>> net = detachnet.make_detachable(trained, sub_models=[0.6], importance=lost)
    """
    if len(images) != len(target) or not len(images):
        raise CutError(
            f"importance is measured on images and their classes, not on {len(images)} and {len(target)}"
        )
    size = tuple(images.shape[1:])
    spans = [span.name for span in find_spans(model, size) if span.bridge is None]
    if not spans:
        raise CutError(f"{type(model).__name__} has no span that nothing needs to stand for")
    routes = {f"span{i}": SubModel(drop=[span]) for i, span in enumerate(spans)}
    net = make_detachable(model, routes, size, norm="shared", check="none")
    with evaluating(net), torch.no_grad():
        whole = _cross_entropy(net, "base", images, target, batch)
        return {
            span: _cross_entropy(net, name, images, target, batch) - whole
            for name, span in zip(routes, spans, strict=True)
        }


def _cross_entropy(net: DetachableNet, name: str, images: Tensor, target: Tensor, batch: int) -> float:
    """Mean over all images."""
    weight, total = weight_of(net), 0.0
    for some, classes in zip(torch.split(images, batch), torch.split(target, batch), strict=True):
        out = logits(net(copy_for(weight, some), which=name)).float()
        total += float(nn.functional.cross_entropy(out, classes.to(weight.device), reduction="sum"))
    return total / len(images)
