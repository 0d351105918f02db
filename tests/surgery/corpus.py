"""Generated networks, each with a forward pass of its own, and whether a family of one is the network.

    python -m tests.surgery.corpus [--nets 1000] [--seed 0] [--until SEED]

A network is written as source: a stem, a few parts (blocks with children, layers without) and a head. Lines
of a small grammar are put into the forward passes of the network and its parts: shapes, arithmetic along an axis,
assignments in place, contexts, random numbers, state, layers of many kinds, features that are given out. Its
sub-models are cuts, inner spans and widths. A family of it is compared with a copy of the network by the rules of
`tests.same`, not by the library's.
"""

from __future__ import annotations

import argparse
import copy
import linecache
import logging
import random
import re
import sys
import types
import warnings
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import nn

import detachnet
from tests.same import DRAWS, FixedGenerator, Rules, alone, compared, is_told, steps

SIZE = (3, 16, 16)
RANDOM_WORDS = re.compile(
    r"rand|normal\(|normal_|uniform|bernoulli|choice|sample\(|permutation|dropout|RANDOM|NUMPY"
    r"|Dropout|Stochastic|DropBlock|Normalize\(True"
)

HEADER = '''
import contextlib, math, random
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

STATE = {"calls": 0}
RANDOM, NUMPY = random.Random(3), np.random.default_rng(3)

class Double(torch.autograd.Function):
    """A backward of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2

class Meter:
    """A plain object that counts."""

    def __init__(self):
        self.count, self.rng = 0, random.Random(4)

    def update(self):
        self.count += 1
        return 1 + 0.1 * self.count

def tenfold(module, args, out):
    return out * 10

def halved(module, args):
    return (args[0] / 2,)

@torch.no_grad()
def quietly(run, h):
    return run(h)

def np_and_python():
    return random.Random(5), np.random.default_rng(5)

def center(h):
    return h.detach().mean((0, 2, 3), keepdim=True)

def norm(h, axes):
    return (h - h.mean(axes, keepdim=True)) / (h.var(axes, keepdim=True) + 1e-5).sqrt()

def mixed_style(h, share, order):
    mean, std = h.mean((2, 3), keepdim=True), h.std((2, 3), keepdim=True) + 1e-5
    other, spread = mean[order], std[order]
    return (h - mean) / std * (share * std + (1 - share) * spread) + share * mean + (1 - share) * other

class OwnNorm(nn.Module):
    """A batch norm that is none of torch's."""

    def __init__(self, act=None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("running", torch.zeros(8))
        self.register_buffer("spread", torch.ones(8))
        if act is not None:
            self.act = act

    def forward(self, x):
        out = F.batch_norm(x, self.running, self.spread, self.weight, self.bias, self.training)
        return self.act(out) if hasattr(self, "act") else out

class VarMean(nn.Module):
    """A norm of one's own, with and without children, that follows what it sees."""

    def __init__(self, deep=False):
        super().__init__()
        self.register_buffer("running", torch.zeros(1, 8, 1, 1))
        self.act = nn.ReLU() if deep else None

    def forward(self, x):
        var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True)
        if self.training:
            with torch.no_grad():
                self.running.lerp_(mean, 0.1)
        else:
            mean = self.running
        out = (x - mean) / (var + 1e-5).sqrt()
        return out if self.act is None else self.act(out)

class GhostNorm(nn.Module):
    """A batch norm over halves of the batch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.cat([self.inner(part) for part in x.chunk(2)]) if self.training else self.inner(x)

class OverTheBatch(nn.Module):
    """Attention, or a recurrent layer, over the images of a batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        v = x.mean((2, 3))[:, None]
        v = self.layer(v)[0] if isinstance(self.layer, nn.LSTM) else self.layer(v, v, v)[0]
        return x + v[:, 0, :, None, None]

class Cached(nn.Module):
    """Keeps what it gave in a dict."""

    def __init__(self, key):
        super().__init__()
        self.cache, self.key, self.conv = {}, key, nn.Conv2d(8, 8, 1)

    def forward(self, x):
        self.cache[self.key] = out = self.conv(x)
        return out

class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight * 2

class Masked(nn.Conv2d):
    """Changes its own weight at each pass."""

    def forward(self, x):
        self.weight.data[:, :2] = 0
        return super().forward(x)

class Normalize(nn.Module):
    """Prepares the image, as layers in front of a network do."""

    def __init__(self, flips=False):
        super().__init__()
        self.register_buffer("shift", torch.full((1, 3, 1, 1), 0.3))
        self.flips = flips

    def forward(self, x):
        if self.flips and self.training:
            x = torch.where(torch.rand(x.shape[0], 1, 1, 1) < 0.5, x.flip(-1), x)
        return (x - self.shift.to(x)) / 2

class Parametrized(nn.Conv2d):
    def __init__(self):
        super().__init__(8, 8, 3, 1, 1)
        torch.nn.utils.parametrize.register_parametrization(self, "weight", Doubled())

def pruned():
    conv = nn.Conv2d(8, 8, 3, 1, 1)
    torch.nn.utils.prune.l1_unstructured(conv, "weight", 0.5)
    return conv

def hooked():
    conv = nn.Conv2d(8, 8, 3, 1, 1)
    conv.register_forward_pre_hook(lambda m, args: m.weight.data.mul_(0.9) and None)
    return conv

def tied(conv):
    other = nn.Conv2d(8, 8, 3, 1, 1)
    other.weight = conv.weight
    return other
'''
PART = """
class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        {children}
        {extra}
        self.weight = nn.Parameter(nn.Conv2d(8, 8, 3).weight.detach())
        self.gain = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))
        self.register_buffer("count", torch.zeros(()))
        self.steps, self.scale, self.seen, self.meter = 0, 0.5, [], Meter()
        self.rng, self.numpy = np_and_python()
        self.last = torch.zeros(1, 8, 1, 1, dtype=torch.double)
        {hooks}

    def forward(self, {taken}):
{taps}{body}
"""
SHAPES = (
    "h = h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)",
    "b, c, height, width = h.shape\nt = h.view(b, 2, c // 2, height, width).transpose(1, 2)\n"
    "h = t.reshape(b, c, height, width)",
    "one, two = h.chunk(2, 1)\nh = torch.cat([two, one * 2], 1)",
    "h = torch.stack(h.unbind(1)[::-1], 1)",
    "h = h / math.sqrt(h.shape[1])",
    "h = h * float(np.sqrt(h.shape[-1]))",
    "if h.shape[-1] > 4:\n    h = h * 0.5",
    "h = F.interpolate(F.avg_pool2d(h, 2), size=h.shape[2:])",
    "h = F.pad(h, (1, 1, 1, 1))[..., 1:-1, 1:-1]",
    "h = h * h.mean((2, 3), keepdim=True).sigmoid()",
    "for i in range(h.shape[1] // 4):\n    h = h + i",
    "h = h.view(-1, 4, *h.shape[2:]).roll(1, 1).view(-1, 8, *h.shape[2:])",
    "h = h + torch.arange(h.shape[1]).to(h)[:, None, None]",
    "h = h + torch.zeros(h.shape[0], 8, 1, 1, dtype=h.dtype)",
    "h = h * (2 if isinstance(h, torch.Tensor) and h.ndim == 4 else 3)",
    "h = CONV(h) + h",
    "h = F.relu(CONV(h)) * self.gain",
    "h = h * self.scale",
)
REDUCE = ("mean", "sum", "amax", "std", "logsumexp", "norm", "var", "prod")
ALONG = (
    "softmax",
    "cumsum",
    "flip",
    "log_softmax",
    "cumprod",
    "diff_of",
    "sorted_of",
    "rolled",
    "normalized",
    "top",
)
AXES = ("0", "1", "2", "-1", "-2", "-4", "(0, 2, 3)", "(2, 3)", "(1, 2, 3)", "(0, 1)", "(0, 1, 2, 3)")
LAYOUTS = (
    ("h", "{}"),
    ("h.transpose(0, 1)", "({}).transpose(0, 1)"),
    ("h.flatten(2).unsqueeze(-1)", "({}).view(h.shape)"),
    ("h.reshape(-1, 4, *h.shape[2:])", "({}).reshape(h.shape)"),
    ("h.permute(1, 2, 3, 0)", "({}).permute(3, 0, 1, 2)"),
    ("h.flatten(0, 1)[:, None]", "({}).view(h.shape)"),
    ("h.mean((2, 3))[:, :, None, None]", "({}) + h"),
)
MIXED = (
    "h = h[torch.randperm(h.shape[0])] + h",
    "h = h - h[:1]",
    "h = h + h[-1]",
    "h = h + h[h.shape[0] // 2]",
    "h = torch.cat([h[1:], h[:1]])",
    "h = h * h.shape[0]",
    "h = h / len(h)",
    "h = h - h.mean()",
    "h = h / h.std()",
    "h = h / h.abs().max()",
    "v = h.mean((2, 3))\nh = h + (v @ v.t()).softmax(1).mean(1)[:, None, None, None]",
    "h = h + torch.einsum('bchw,dchw->bd', h, h).mean(1)[:, None, None, None]",
    "v = h.flatten(1)\nh = h + torch.cdist(v, v).mean(1)[:, None, None, None]",
    "h = F.batch_norm(h, None, None, training=True)",
    "h = F.batch_norm(h, None, None, training=self.training) if self.training else h",
    "h = F.instance_norm(h)",
    "h = F.group_norm(h, 2)",
    "h = norm(h, (0, 2, 3))",
    "h = norm(h, (1, 2, 3))",
    "h = norm(h.transpose(0, 1), (1, 2, 3)).transpose(0, 1)",
    "lam = torch.rand(h.shape[0], 1, 1, 1, dtype=h.dtype)\nh = lam * h + (1 - lam) * h.flip(0)",
    "lam = torch.rand(())\nh = lam * h + (1 - lam) * h.roll(1, 0)",
    "h = F.avg_pool3d(h.transpose(0, 1), (3, 1, 1), 1, (1, 0, 0)).transpose(0, 1)",
    "t = h.flatten(1).t()[:, None]\nt = F.conv1d(t, torch.ones(1, 1, 3, dtype=h.dtype), padding=1)[:, 0]\n"
    "h = t.t().reshape(h.shape)",
    "h = h + torch.arange(h.shape[0]).to(h)[:, None, None, None]",
    "h = torch.where(h > h.median(), h, h * 0.5)",
    "i = h.mean((1, 2, 3)).argsort()\nh = h + h[i]",
    "h = h.view(h.shape[0], 2, 4, *h.shape[2:]).flatten(0, 1)\n"
    "h = (h - h.mean((2, 3), keepdim=True)).view(-1, 8, *h.shape[2:])",
    "t = torch.zeros_like(h)\nt[:-1, :2] = h[1:, :2]\nt[:, 2:] = h[:, 2:]\nh = t",
    "total = 0\nfor i in range(8):\n    total = total + h[:, i : i + 1].mean(0)\nh = h + total",
    "h = h.index_select(0, torch.arange(h.shape[0]).flip(0)) * 0.5 + h",
    "h = h + F.softmax(h.flatten(1).sum(1), dim=0)[:, None, None, None]",
    "h = h.gather(1, h.argsort(1))",
    "h = torch.vmap(lambda one: one - one.mean())(h)",
    "h = mixed_style(h, 0.4, torch.randperm(h.shape[0]))",
    "h = mixed_style(h, torch.rand(h.shape[0], 1, 1, 1).to(h), torch.arange(h.shape[0]).flip(0))",
    "h = 0.4 * h + 0.6 * torch.flip(h, dims=[0])",
    "h = h + torch.roll(h, shifts=1, dims=0)",
    "h = h + torch.roll(h, (1, 1), (0, 2))",
    "var, mean = torch.var_mean(h, (0, 2, 3), keepdim=True)\nh = (h - mean) / (var + 1e-5).sqrt()",
    "std, mean = torch.std_mean(h, dim=(1, 2, 3), keepdim=True)\nh = (h - mean) / (std + 1e-5)",
    "h = torch.cat([norm(part, (0, 2, 3)) for part in h.chunk(2)])",
    "h = torch.cat([part - part.mean(0, keepdim=True) for part in torch.split(h, 2)])",
    "h = norm(h.view(2, -1, *h.shape[1:]), (1, 3, 4)).flatten(0, 1)",
    "h = h.repeat(2, 1, 1, 1)[: h.shape[0]] * 2",
    "h = h.repeat_interleave(2, 0)[::2] + h",
    "h = torch.cat([h, h.flip(0)])[h.shape[0] :]",
    "v = h.mean((2, 3))\nh = h * torch.tensordot(v, v, ([0], [0])).diagonal()[:, None, None].tanh()",
    "v = h.mean((2, 3))[None]\nh = h + F.scaled_dot_product_attention(v, v, v)[0][:, :, None, None]",
    "h = h.unflatten(0, (-1, 1)).flip(0).flatten(0, 1)",
    "h = h[:, torch.arange(7, -1, -1)]",
    "h = h - h[::2].mean(0)",
    "h = h + h.mean((1, 2, 3)).cumsum(0)[:, None, None, None]",
    "h = h * (h.flatten(1).norm(dim=1) / h.norm())[:, None, None, None]",
    "i = torch.arange(h.shape[0]) // 2 * 2\nh = h + 0.5 * h[i]",
    "h = h.movedim(0, -1).softmax(-1).movedim(-1, 0) + h",
    "h = h.swapaxes(0, 1).cumsum(1).swapaxes(0, 1)",
    "h = h + h.T.mean(-1, keepdim=True).T",
    "m = h.flatten(2)\nh = h + torch.bmm(m, m.transpose(1, 2)).softmax(-1).mean(2)[..., None, None]",
    "m = h.flatten(2).transpose(0, 1)\nh = h + torch.bmm(m, m.transpose(1, 2)).mean((0, 2))[:, None, None, None]",
    "h = torch.stack([h, h.flip(0)]).mean(0)",
    "h = torch.where(torch.arange(h.shape[0])[:, None, None, None] < 2, h, h * 2)",
    "h = h * torch.linspace(1, 2, h.shape[0]).to(h)[:, None, None, None]",
    "h = h.masked_fill(h > h.amax(0, keepdim=True) * 0.5, 0.5)",
    "h = h - h.quantile(0.5)",
    "h = h + F.unfold(h, 1).view_as(h).roll(1, -1)",
)
IN_PLACE = (
    "h += 1",
    "h *= 0.5",
    "h[:, :4] += 1",
    "part = h[:, 2:]\npart *= 0.5",
    "part = h.view(h.shape[0], -1)[:, ::2]\npart += 1",
    "h = h.clone()\nh[0] = 1",
    "h = h.clone()\nh[1:] -= h[:-1]",
    "h = h * 1\nh.clamp_(min=0)",
    "h = h * 1\nh[h > 1] = 1",
    "h = h * 1\nh[:, 0] = 0.0",
    "keep = h\nh += 1\nh = h * keep",
    "keep = h * 1\nh = keep.add_(1) + keep",
    "h = h + 0\nh.transpose(0, 1)[1:] += 1",
    "h = F.relu(h, inplace=True)",
    "h = F.leaky_relu(h * 1, 0.1, inplace=True) + h",
    "h = h * 1\nh.data.mul_(2)",
    "h = h * 1\nh.masked_fill_(h < 0, 0.1)",
    "h = h * 1\nh.unsqueeze(0).add_(1)",
    "h = h * 1\nfor i in range(4):\n    h[:, i] -= i",
    "h = h * 1\nh.index_add_(1, torch.tensor([0, 2]), h[:, 4:6].clone())",
    "h = h * 1\nh.index_add_(0, torch.tensor([0, 1]), h[1:3].clone())",
    "h = h * 1\nflat = h.flatten(1)\nflat.sub_(flat.mean(1, keepdim=True))",
    "h = h * 1\nh -= h.mean(0)",
    "t = h.new_zeros(h.shape)\nt.copy_(h)\nh = t * 2",
    "t = torch.empty_like(h)\nt[:] = h * 2\nh = t",
    "t = torch.zeros(h.shape, dtype=h.dtype)\nt += h\nh = t",
    "parts = [h * i for i in range(3)]\nparts[0] += 1\nh = sum(parts)",
    "h = h * 1\nh.relu_().mul_(2)",
    "w = self.weight * 1\nw[:, :4] = 0\nh = F.conv2d(h, w, padding=1)",
    "h = h.contiguous()\nh.view(-1)[::7] *= 1.0 if h.requires_grad else 1.0",
    "taps.append(h)\nh = h * 2\nh += 1",
    "taps.append(h)\nh += 1",
    "taps.append(h[:, :4])\nh[:, 2:] *= 0.5",
    "taps.append(F.relu(h))\nh = F.relu(h, inplace=True)",
    "t = h * 1\ntaps.append(t)\nh = F.leaky_relu(t, 0.1, inplace=True)",
    "t = h.view(h.shape[0], -1)\ntaps.append(t.mean(1))\nt -= t.mean(1, keepdim=True).detach()",
    "h = h * 1\nv = h.flatten(2)\nw = v[..., ::2]\nw.mul_(0.5)\nh = h + v.view_as(h)",
    "h = h * 1\nh.select(1, 0).zero_()",
    "h = h * 1\none, two = h.chunk(2, 1)\none.add_(two)",
    "h = h * 1\nfor part in h.unbind(1)[:3]:\n    part += 1",
    "h = h * 1\nh.diagonal(dim1=2, dim2=3).mul_(2)",
    "h = h * 1\nh.narrow(0, 0, 1).mul_(2)",
    "h = h * 1\ntorch.add(h, 1, out=h.detach())",
    "h = h * 1\nh[torch.arange(h.shape[0]), 0] = 1",
    "h = h * 1\nh.expand_as(h).mul_(2)",
    "h = h * 1\ntwice = h.unsqueeze(1).squeeze(1)\ntwice **= 2",
    "h = h * 1\nh[..., 0].copy_(h[..., 1])",
    "h = h * 1\nh.index_copy_(1, torch.tensor([0]), h[:, 1:2].clone())",
    "h = h * 1\nh.scatter_(1, torch.zeros_like(h[:, :1], dtype=torch.long), 0.5)",
    "h = h * 1\nh.T.mul_(2)",
    "h = h * 1\nF.dropout(h, 0.0, self.training, inplace=True).add_(1)",
)
LAYERS = (
    *("OwnNorm()", "OwnNorm(nn.ReLU())", "VarMean()", "VarMean(True)", "GhostNorm()", "Masked(8, 8, 3, 1, 1)"),
    *("nn.BatchNorm2d(8, momentum=None)", "nn.BatchNorm2d(8, track_running_stats=False)", "hooked()", "pruned()"),
    *("nn.InstanceNorm2d(8, affine=True, track_running_stats=True)", "nn.InstanceNorm2d(8)", "nn.GroupNorm(2, 8)"),
    *("nn.Sequential(OwnNorm(), nn.ReLU(inplace=True))", "nn.Softmax(0)", "nn.Softmax2d()", "nn.LayerNorm(8)"),
    *("nn.utils.spectral_norm(nn.Conv2d(8, 8, 1))", "nn.utils.weight_norm(nn.Conv2d(8, 8, 1))", "Parametrized()"),
    *("parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))", "parametrizations.weight_norm(nn.Conv2d(8, 8, 1))"),
    *("nn.Dropout(0.5)", "nn.Dropout2d(0.3, inplace=True)", "nn.AlphaDropout(0.2)", "nn.LocalResponseNorm(3)"),
    *("nn.ReLU6(inplace=True)", "nn.PReLU(8)", "nn.ChannelShuffle(2)", "nn.Hardtanh(inplace=True)"),
    *("OverTheBatch(nn.MultiheadAttention(8, 2))", "OverTheBatch(nn.LSTM(8, 8))", "Cached('a')", "nn.Identity()"),
    *("OverTheBatch(nn.MultiheadAttention(8, 2, batch_first=True))", "nn.DataParallel(nn.Conv2d(8, 8, 3, 1, 1))"),
    *("torchvision.ops.StochasticDepth(0.5, 'row')", "torchvision.ops.StochasticDepth(0.5, 'batch')"),
    *("torchvision.ops.FrozenBatchNorm2d(8)", "torch.jit.script(nn.Hardswish())", "tied(CONVOLUTION)"),
    *("CONVOLUTION", "nn.Sequential(CONVOLUTION, nn.BatchNorm2d(8))", "torchvision.ops.DropBlock2d(0.2, 3)"),
    *(
        "nn.ModuleList([nn.Conv2d(8, 8, 1), OwnNorm()])[1]",
        "nn.utils.parametrizations.orthogonal(nn.Conv2d(8, 8, 1))",
    ),
    *(
        "nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8).requires_grad_(False)).eval()",
        "nn.Upsample(scale_factor=1)",
    ),
)
"""Layers with eight channels; CONVOLUTION is one that is there already."""
PREPARED = (
    "Normalize()",
    "Normalize(True)",
    "nn.BatchNorm2d(3, affine=False)",
    "nn.InstanceNorm2d(3)",
    "nn.Identity()",
)
OUTPUTS = (
    *("return out",) * 12,
    *("return out, *taps", "return {'out': out, 'taps': taps}", "return out, h", "return [out, h * 2]"),
    *("return (out.softmax(1), out) if not self.training else out", "return out, h.mean()"),
)
IMAGE = (
    "x = (x - 0.5) / 2",
    "x = x * 1\nx[:, 0] -= 0.5",
    "for i in range(3):\n    x[:, i].sub_(0.5)",
    "x = x.flip(-1)",
    "x -= 0.5",
    "x = x - x.mean(0, keepdim=True)",
    "x = x + 0.1 * torch.randn_like(x)",
    "x = F.interpolate(x, scale_factor=1.0)",
)
CONTEXTS = (
    "with torch.no_grad():\n    {}",
    "with torch.inference_mode():\n    t = CONV(h)\nh = h + t.clone().mean().item()",
    "with torch.autocast('cpu', dtype=torch.bfloat16):\n    t = CONV(h)\nh = t.to(h.dtype)",
    "with torch.autocast('cpu', enabled=False):\n    {}",
    "with torch.autocast(h.device.type, dtype=torch.bfloat16):\n    t = h.flatten(1) @ h.flatten(1).t()\n"
    "h = h + t.to(h.dtype).mean(1)[:, None, None, None]",
    "h = checkpoint(lambda y: CONV(y).relu(), h, use_reentrant=False)",
    "h = checkpoint(lambda y: CONV(y).relu(), h, use_reentrant=True)",
    "torch.set_grad_enabled(False)\nt = CONV(h)\ntorch.set_grad_enabled(self.training)\nh = h + t",
    "with torch.no_grad():\n    with torch.enable_grad():\n        t = CONV(h)\nh = h + t",
    "with torch.enable_grad():\n    {}",
    "h = quietly(lambda y: CONV(y), h) + h",
    "h = Double.apply(CONV(h))",
    "h = h + Double.apply(h) * 0.5",
    "with torch.autograd.graph.save_on_cpu():\n    {}",
    "with contextlib.nullcontext():\n    {}",
    "h = CONV(h.detach()) + h",
    "h = CONV(h).detach() + h",
    "with torch.random.fork_rng():\n    torch.manual_seed(1)\n    h = h + torch.rand(8, 1, 1, dtype=h.dtype)",
    "with torch.set_grad_enabled(h.shape[1] > 100):\n    {}",
    "w = self.weight.detach()\nh = F.conv2d(h, w, padding=1)",
    "h = h + (CONV(h) - h).detach()",
    "h.register_hook(lambda gradient: gradient * 2) if h.requires_grad else None",
    "h = h * (1 if torch.is_grad_enabled() else 2)",
    "h = h * (2 if h.dtype == torch.float64 else 1)",
    "h = h * (2 if h.device.type == 'cpu' else 1)",
    "h = h * (2 if h.is_contiguous() else 1)",
    "h = h * (2 if h.requires_grad else 1)",
    "h = h * (2 if self.weight.requires_grad else 1)",
    "h = h * (2 if next(self.parameters()).device.type == 'cpu' else 1)",
    "h = h * (1.5 if torch.is_autocast_enabled('cpu') else 1)",
)
RANDOM = (
    "h = h * random.random()",
    "if random.random() < 0.5:\n    {}",
    "if self.training and np.random.rand() < 0.5:\n    {}",
    "h = h * np.random.uniform(0.5, 1.5)",
    "h = h * random.uniform(0.5, 1.5)",
    "h = h + h * self.rng.random()",
    "if self.rng.random() < 0.5:\n    {}",
    "h = h * self.numpy.random()",
    "if self.numpy.random() < 0.5:\n    {}",
    "h = h * RANDOM.random()",
    "h = h * NUMPY.random()",
    "h = h * self.meter.rng.random()",
    "h = h * random.choice([0.5, 1.0, 2.0])",
    "h = h[:, random.sample(range(8), 8)]",
    "h = h[:, np.random.permutation(8)]",
    "h = h * torch.rand(()).to(h)",
    "h = h + torch.rand_like(h)",
    "h = h + torch.randn(h.shape, dtype=h.dtype)",
    "h = h + torch.randn(1, 8, 1, 1).to(h)",
    "h = h * torch.empty(h.shape[0], 1, 1, 1).bernoulli_(0.5).to(h)",
    "h = h * h.new_empty((h.shape[0], 1, 1, 1)).bernoulli_(0.5)",
    "h = h * torch.empty(1).uniform_().item()",
    "if torch.rand(1).item() < 0.5:\n    {}",
    "if torch.rand(()) < 0.5:\n    {}",
    "h = F.dropout(h, 0.5, self.training)",
    "h = F.dropout2d(h, 0.25, self.training)",
    "h = F.dropout(h, 0.25) if self.training else h",
    "h = h * torch.bernoulli(torch.full_like(h[:, :1, :1, :1], 0.5))",
    "h = h + torch.normal(0.0, 0.1, (8, 1, 1)).to(h)",
    "h = h[:, torch.randperm(8)]",
    "i = torch.randint(0, 8, (1,)).item()\nh = h + h[:, i : i + 1]",
    "h = h + torch.zeros(8, 1, 1).normal_().to(h)",
    "h = h * (1 + 0.1 * (torch.rand(h.shape[0], 8, 1, 1) > 0.5).to(h))",
)
STATE = (
    "self.mean = 0.9 * self.mean + 0.1 * center(h)\nh = h - self.mean",
    "if self.training:\n    self.mean = 0.9 * self.mean + 0.1 * center(h)\nh = h - self.mean",
    "if self.training:\n    self.mean.mul_(0.9).add_(0.1 * center(h))\nh = h - self.mean",
    "if self.training:\n    self.mean.copy_(center(h))\nh = h - self.mean",
    "h = h - self.mean\nif self.training:\n    self.mean.lerp_(center(h), 0.1)",
    "self.mean[:] = center(h)\nh = h - self.mean",
    "self.mean += 1\nh = h + self.mean",
    "self.count += 1\nh = h * self.count",
    "self.count.add_(1)",
    "self.count = self.count + 1\nh = h * self.count",
    "self.steps += 1\nh = h * self.steps",
    "self.steps += 1\nif self.steps > 1:\n    {}",
    "self.seen.append(1)\nh = h * len(self.seen)",
    "h = h * self.meter.update()",
    "STATE['calls'] += 1\nh = h * STATE['calls']",
    "self._buffers['mean'] = self._buffers['mean'] + 1\nh = h + self.mean",
    "self.register_buffer('mean', self.mean + 1)\nh = h + self.mean",
    "setattr(self, 'mean', self.mean + 1)\nh = h + self.mean",
    "h = h - self.last\nself.last = center(h)",
    "self.last += 1\nh = h + self.last",
    "self.last.add_(1)\nh = h + self.last",
    "self.mean.data = self.mean + 1\nh = h + self.mean",
    "with torch.no_grad():\n    self.gain.mul_(0.9)\nh = h * self.gain",
    "self.gain.data.mul_(0.9)\nh = h * self.gain",
    "self.scale = self.scale * 0.9\nh = h * self.scale",
    "self.scale *= 0.9\nh = h * self.scale",
    "self.__dict__['steps'] += 1\nh = h * self.steps",
    "type(self).calls = getattr(type(self), 'calls', 0) + 1\nh = h * type(self).calls",
    "torch.add(self.mean, 1, out=self.mean)\nh = h + self.mean",
    "mean = self.mean\nmean += 1\nh = h + mean",
    "h = F.batch_norm(h, self.mean.flatten(), self.mean.flatten() + 1, None, None, self.training)",
    "self.mean.view(-1)[0] += 1\nh = h + self.mean",
    "if not hasattr(self, 'made'):\n    self.made = torch.ones(8, 1, 1, dtype=torch.double)\nh = h + self.made",
    "if self.count == 0:\n    self.count.fill_(2)\nh = h * self.count",
)
KINDS: dict[str, tuple[str, ...]] = {
    "shapes": SHAPES,
    "mixed": MIXED,
    "in place": IN_PLACE,
    "contexts": CONTEXTS,
    "random": RANDOM,
    "state": STATE,
    "layers": ("h = self.extra(h)", "h = self.extra(h) + h", "h = self.extra(self.extra(h))"),
    "axes": (),
    "reduced": (),
}
HELPERS = """
def diff_of(h, axis):
    return h - h.roll(1, axis)

def sorted_of(h, axis):
    return h.sort(axis)[0]

def rolled(h, axis):
    return 0.5 * h + h.roll(1, axis)

def normalized(h, axis):
    return F.normalize(h, dim=axis)

def top(h, axis):
    return h - h.topk(1, axis)[0]
"""


class Writer:
    """Writes one network."""

    def __init__(self, seed: int) -> None:
        self.rng, self.kinds = random.Random(seed), Counter[str]()

    def module(self) -> str:
        """The source of a network."""
        parts = [self.part(f"Part{i}") for i in range(self.rng.randint(1, 2))]
        body = [self.rng.choice(IMAGE)] if self.rng.random() < 0.15 else []
        body += ["x = self.prepare(x)"] if self.rng.random() < 0.15 else []
        body += ["h = self.stem(x)"]
        for i in range(len(parts)):
            body += self.statements(self.rng.choice((0, 0, 1)), "self.conv")
            body += [f"h = self.part{i}(h)"]
        body += self.statements(self.rng.choice((0, 0, 1)), "self.conv")
        body += ["out = self.fc(self.conv(h).mean((2, 3)))", self.rng.choice(OUTPUTS)]
        children = [
            "self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))",
            "self.conv, self.fc = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)",
            *(f"self.part{i} = Part{i}()" for i in range(len(parts))),
        ]
        if "x = self.prepare(x)" in body:
            children.append(f"self.prepare = {self.rng.choice(PREPARED)}")
        net = self.text("Net", children, body, "x", "self.conv", hooks=self.rng.random() < 0.03)
        return HEADER + HELPERS + "".join(parts) + net

    def part(self, name: str) -> str:
        """A block with children, which is traced, or a layer without."""
        opened = self.rng.random() < 0.75
        conv = "self.inner" if opened else "self.own"
        children = ["self.inner, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)"] if opened else []
        body = self.statements(self.rng.randint(1, 3), conv)
        if opened:
            body.insert(self.rng.randint(0, len(body)), "h = self.norm(self.inner(h))")
        inner = "self.inner" if opened else "nn.Conv2d(8, 8, 3, 1, 1)"
        return self.text(name, children, [*body, "return h"], "h", inner, hooks=self.rng.random() < 0.05)

    def text(self, name: str, children: list[str], body: list[str], taken: str, conv: str, hooks: bool) -> str:
        lines = [f"        {line}" for statement in body for line in statement.splitlines()]
        hook = self.rng.choice(("self.register_forward_hook(tenfold)", "self.register_forward_pre_hook(halved)"))
        extra = self.rng.choice(LAYERS).replace("CONVOLUTION", conv)
        return PART.format(
            name=name,
            children="\n        ".join(children) or "pass",
            extra=f"self.extra = {extra}" if any("self.extra" in line for line in lines) else "pass",
            hooks=hook if hooks else "pass",
            taken=taken,
            taps="        taps = []\n" if any("taps" in line for line in lines) else "",
            body="\n".join(lines),
        )

    def statements(self, count: int, conv: str) -> list[str]:
        written = [self.statement() for _ in range(count)]
        call = "F.conv2d({}, self.weight, padding=1)" if conv == "self.own" else f"{conv}({{}})"
        return [
            re.sub(r"CONV\((.*?)\)(?=$|[ .*)\n])", lambda m: call.format(m[1]), s, flags=re.M) for s in written
        ]

    def statement(self) -> str:
        kind = self.rng.choice(list(KINDS))
        self.kinds[kind] += 1
        if kind in ("axes", "reduced"):
            return self.along_an_axis(kind == "reduced")
        text = self.rng.choice(KINDS[kind])
        if "{}" in text:
            indent = re.search(r"^( *)\{\}", text, re.M)
            inner = self.rng.choice((*SHAPES[:12], *MIXED[:8], "h = CONV(h)", "h = h + self.gain"))
            text = text.replace("{}", inner.replace("\n", "\n" + (indent[1] if indent else "")))
        return text

    def along_an_axis(self, reduced: bool) -> str:
        before, after = self.rng.choice(LAYOUTS)
        axes = [axis for axis in AXES if reduced or "(" not in axis]
        axis = self.rng.choice(axes)
        if reduced:
            op = self.rng.choice(REDUCE)
            if op == "prod" and "(" in axis:
                op = "mean"
            inner = f"t {self.rng.choice('-*+')} t.{op}({axis}, keepdim=True)"
            inner = inner.replace("t.norm(", "t.norm(2, ")
        else:
            op = self.rng.choice(ALONG)
            inner = f"{op}(t, {axis})" if op in HELPERS else f"t.{op}({axis})"
        return f"t = {before}\nh = {after.format(inner)}"


def build(source: str, name: str) -> nn.Module:
    """The network that a source writes; tracebacks and `inspect` see its lines."""
    module, file = types.ModuleType(name), f"{name}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    sys.modules[name] = module
    exec(compile(source, file, "exec"), vars(module))
    torch.manual_seed(1)
    model: nn.Module = module.Net().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.rand_like(parameter))
    return model


def patches_of(net: nn.Module, draw: float) -> list[Any]:
    """What a network draws random numbers from besides the common ones, replaced."""
    made = []
    for part in net.modules():
        module = sys.modules[type(part).__module__]
        generator = FixedGenerator(draw)
        if hasattr(module, "RANDOM") and hasattr(module, "Net"):
            made.append(mock.patch.dict(vars(module), {"RANDOM": generator, "NUMPY": generator}))
        if "meter" in vars(part):
            made.append(mock.patch.dict(vars(part), {"rng": generator, "numpy": generator}))
            made.append(mock.patch.object(part.meter, "rng", generator))
    return made


def reset(net: nn.Module) -> None:
    """Put back what a network counts outside of itself."""
    module = next(sys.modules[type(m).__module__] for m in net.modules() if type(m).__name__ == "Net")
    module.STATE["calls"] = 0
    for part in net.modules():
        if hasattr(type(part), "calls") and hasattr(part, "meter"):
            del type(part).calls


def judge(source: str, name: str, asked: dict[str, Any]) -> tuple[str, str]:
    """What became of one network, and what is to be said of it: equal, refused, named, silent, broken or unfit.

    Args:
        source: Its text.
        name: What its module is called.
        asked: Arguments of `make_detachable`.
    """
    draws = DRAWS if RANDOM_WORDS.search(source.replace(HEADER, "")) else DRAWS[:1]
    bound = 5e-2 if "bfloat16" in source.replace(HEADER, "") else 1e-6
    rules = Rules(SIZE, bound, draws, patches=patches_of, reset=reset)
    try:
        model = build(source, name)
        for draw in draws:
            steps(copy.deepcopy(model), alone, draw, rules)
    except Exception as error:  # the network itself does not run
        return "unfit", f"{type(error).__name__}: {error}".splitlines()[0]
    pristine, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    try:
        net = detachnet.make_detachable(model, input_size=SIZE, **asked)
    except detachnet.DetachNetError as error:
        return "refused", str(error)
    except Exception as error:
        return "broken", f"{type(error).__name__}: {error}".splitlines()[0]
    if changed := _changed(model, pristine, before):
        return "silent", f"make_detachable changed {changed}"
    try:
        said = compared(pristine, net, rules)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    if not said:
        return "equal", ""
    told = " | ".join([*net.plan.hints, net.plan.checked])
    return "named" if is_told(said, net.plan) else "silent", f"{said} | {told}"


def _changed(model: nn.Module, pristine: nn.Module, before: dict[str, Any]) -> str:
    """What is no longer as it was in a model; empty if nothing."""
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    changed += [
        f"{path}.{key}"
        for (path, one), (_, two) in zip(model.named_modules(), pristine.named_modules(), strict=True)
        for key in ("steps", "scale", "seen")
        if getattr(one, key, 0) != getattr(two, key, 0)
    ]
    return changed[0] if changed else ""


CUTS: tuple[Any, ...] = (
    *(["stem"], ["stem"], ["stem", "conv"], ["part0"], ["conv"]),
    {"sub0": detachnet.SubModel(drop=["stem:part0"])},
    {"sub0": detachnet.SubModel(drop=["part0:conv"])},
    {"sub0": "stem", "sub1": detachnet.SubModel(drop=["stem:part0"])},
    {"sub0": "part0", "sub1": detachnet.SubModel(drop=[":stem", "part0:conv"])},
    {"sub0": detachnet.SubModel(width=0.5)},
    {"sub0": "stem", "sub1": detachnet.SubModel(drop=["stem:part0"], width=0.5)},
    {"sub0": detachnet.SubModel(width=0.5), "sub1": detachnet.SubModel(drop=[":stem"], width=0.5)},
)


def written(seed: int) -> tuple[str, dict[str, Any]]:
    """A network's source and what to ask for."""
    writer = Writer(seed)
    source = writer.module()
    asked: dict[str, Any] = {"cuts": writer.rng.choice(CUTS)}
    if writer.rng.random() < 0.15:
        asked["norm"] = "shared"
    if writer.rng.random() < 0.15:
        asked["head"] = "private"
    return source, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=1000, help="networks that run by themselves")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--until", type=int, help="stop in front of this seed: parts of a corpus run side by side")
    parser.add_argument("--only", type=int, help="show this seed's source and what became of it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("detachnet").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.only is not None:
        source, asked = written(options.only)
        print(source.replace(HEADER + HELPERS, ""), asked)
        print(*judge(source, f"corpus_{options.only}", asked))
        return
    counts, seed = Counter[str](), options.seed
    while counts.total() - counts["unfit"] < options.nets and seed != options.until:
        source, asked = written(seed)
        verdict, said = judge(source, f"corpus_{seed}", asked)
        counts[verdict] += 1
        if verdict in ("silent", "broken", "named"):
            print(seed, verdict, asked, said[:400], flush=True)
        elif verdict == "refused":
            print(seed, verdict, said.splitlines()[0], flush=True)
        sys.modules.pop(f"corpus_{seed}", None)
        seed += 1
    print(dict(counts), flush=True)


if __name__ == "__main__":
    main()
