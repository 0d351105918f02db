"""model -> order: which filters of a group to keep first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detachnet.surgery.modules import unwrap
from detachnet.surgery.tracer import PREFIX
from detachnet.surgery.widths.channels import CONSTANT, Channels
from detachnet.surgery.widths.groups import group_channels, group_names

_NORMS = ("norm", "group norm", "layer norm")


def important(model: nn.Module, channels: Channels) -> dict[str, list[int]]:
    """Order each group's filters by importance: what `choose(order=…)` takes.

    A unit is as important as the sum over its channels of the norms' |γ| times the L1 norm of the weights that
    read them; where no norm follows, of the weights alone. One order serves all widths, so that smaller nest in
    the larger ones. Source: the channel sorting of Cai et al., Once for All, arXiv 1908.09791; the gains are ours.

    Args:
        model: The model, trained.
        channels: What `find_channels` found in its trace.

    Returns:
        Name of each group that can be cut → its units, the most important first.
    """
    roots = channels.atoms.roots()
    gains, norms, weights = (torch.zeros(len(roots), dtype=torch.float64) for _ in range(3))
    for path, layer in channels.layers.items():
        module, atoms = unwrap(model).get_submodule(path.removeprefix(PREFIX)), layer.reads.clamp_min(CONSTANT)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        size = weight.detach().abs().double().cpu()
        axis = 0 if layer.kind == "transposed" else 1
        if layer.kind in _NORMS:
            gains.index_add_(0, roots[atoms], size)
            norms.index_add_(0, roots[atoms], torch.ones_like(size))
        elif layer.makes is not None and size.shape[axis] == len(atoms):
            weights.index_add_(0, roots[atoms], size.movedim(axis, 0).flatten(1).sum(1))
    score = torch.where(norms > 0, gains, 1.0) * weights
    groups = group_channels(channels)
    return {
        name: score[list(group.roots)].argsort(descending=True, stable=True).tolist()
        for group, name in zip(groups, group_names(channels), strict=True)
        if not group.reason
    }
