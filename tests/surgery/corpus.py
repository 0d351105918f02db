"""Generated networks, each with a forward pass of its own, and whether a family of one is the network.

    python -m tests.surgery.corpus [--nets 1000] [--seed 0]

A network is written as source: a stem, a few parts (blocks with children, layers without) and a head. Lines
of a small grammar are put into the forward passes of the network and its parts: shapes, arithmetic along an axis,
assignments in place, contexts, random numbers, state. A family of it is compared with a copy of the network by the
rules here, not by the library's: outputs, gradients and buffers of two training passes and one in evaluation mode.
Random numbers are replaced by fixed ones, in two ways: what a trace has baked in then shows, whatever the order.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import detachnet

SIZE = (3, 16, 16)
DRAWS = (0.3, 0.7)
"""What stands for random numbers; decisions by a half fall either way."""
SAID = re.compile(r"the family does without|in another order|all models share|does not run the hooks")
"""Sentences of a plan that tell of a difference."""
SAID_JOINT = re.compile(rf"{SAID.pattern}|the model gives other outputs each time")
RANDOM_WORDS = re.compile(
    r"rand|normal\(|normal_|uniform|bernoulli|choice|sample\(|permutation|dropout|RANDOM|NUMPY"
)

HEADER = '''
import contextlib, math, random
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
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
'''
PART = """
class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        {children}
        self.weight = nn.Parameter(nn.Conv2d(8, 8, 3).weight.detach())
        self.gain = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))
        self.register_buffer("count", torch.zeros(()))
        self.steps, self.scale, self.seen, self.meter = 0, 0.5, [], Meter()
        self.rng, self.numpy = np_and_python()
        self.last = torch.zeros(1, 8, 1, 1, dtype=torch.double)
        {hooks}

    def forward(self, {taken}):
{body}
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
DRAWN = (
    *("bernoulli", "bernoulli_", "normal", "normal_", "rand", "rand_like", "randint", "randint_like", "randn"),
    *("randn_like", "random_", "randperm", "uniform_", "exponential_", "native_dropout"),
)


class Writer:
    """Writes one network."""

    def __init__(self, seed: int) -> None:
        self.rng, self.kinds = random.Random(seed), Counter[str]()

    def module(self) -> str:
        """The source of a network."""
        parts = [self.part(f"Part{i}") for i in range(self.rng.randint(1, 2))]
        takes_image = self.rng.random() < 0.15
        body = [self.rng.choice(IMAGE)] if takes_image else []
        body += ["h = self.stem(x)"]
        for i in range(len(parts)):
            body += self.statements(self.rng.choice((0, 0, 1)), "self.conv")
            body += [f"h = self.part{i}(h)"]
        body += self.statements(self.rng.choice((0, 0, 1)), "self.conv")
        body += ["return self.fc(self.conv(h).mean((2, 3)))"]
        children = [
            "self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))",
            "self.conv, self.fc = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)",
            *(f"self.part{i} = Part{i}()" for i in range(len(parts))),
        ]
        net = self.text("Net", children, body, "x", hooks=self.rng.random() < 0.03)
        return HEADER + HELPERS + "".join(parts) + net

    def part(self, name: str) -> str:
        """A block with children, which is traced, or a layer without."""
        opened = self.rng.random() < 0.75
        conv = "self.inner" if opened else "self.own"
        children = ["self.inner, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)"] if opened else []
        body = self.statements(self.rng.randint(1, 3), conv)
        if opened:
            body.insert(self.rng.randint(0, len(body)), "h = self.norm(self.inner(h))")
        return self.text(name, children, [*body, "return h"], "h", hooks=self.rng.random() < 0.05)

    def text(self, name: str, children: list[str], body: list[str], taken: str, hooks: bool) -> str:
        lines = [f"        {line}" for statement in body for line in statement.splitlines()]
        hook = self.rng.choice(("self.register_forward_hook(tenfold)", "self.register_forward_pre_hook(halved)"))
        return PART.format(
            name=name,
            children="\n        ".join(children) or "pass",
            hooks=hook if hooks else "pass",
            taken=taken,
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


class _Fixed(TorchDispatchMode):
    """Random numbers of torch are fixed ones."""

    def __init__(self, draw: float) -> None:
        super().__init__()
        self.draw = draw

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name not in DRAWN:
            return func(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            out = func(*args, **kwargs)
        if name == "randperm":
            fixed = torch.arange(len(out)).flip(0) if self.draw < 0.5 else torch.arange(len(out)).roll(1)
            return out.copy_(fixed)
        if "bernoulli" in name:
            p = args[1] if len(args) > 1 else args[0] if name == "bernoulli" else 0.5
            return out.copy_((torch.as_tensor(p, dtype=out.dtype) > self.draw).expand_as(out))
        if "randint" in name:
            low, high = (args[0], args[1]) if len(args) > 2 else (0, args[0])
            return out.fill_(int(low + self.draw * (high - low)))
        return out.fill_(self.draw)


class _FixedGenerator:
    """Stands for an object that draws random numbers."""

    def __init__(self, draw: float) -> None:
        self.draw = draw

    def random(self) -> float:
        return self.draw


@contextmanager
def fixed(draw: float, *nets: nn.Module) -> Iterator[None]:
    """All random numbers are one number."""
    names = {
        (random, "random"): lambda: draw,
        (random, "uniform"): lambda low, high: low + draw * (high - low),
        (random, "choice"): lambda of: of[int(draw * len(of))],
        (random, "sample"): lambda of, n: list(of)[::-1] if draw < 0.5 else list(of)[1:] + list(of)[:1],
        (np.random, "rand"): lambda: draw,
        (np.random, "uniform"): lambda low, high: low + draw * (high - low),
        (np.random, "permutation"): lambda n: (
            np.arange(n)[::-1].copy() if draw < 0.5 else np.roll(np.arange(n), 1)
        ),
    }
    patches = [mock.patch.object(owner, name, replaced) for (owner, name), replaced in names.items()]
    for part in {id(part): part for net in nets for part in net.modules()}.values():
        module = sys.modules[type(part).__module__]
        if hasattr(module, "RANDOM") and hasattr(module, "Net"):
            both = {"RANDOM": _FixedGenerator(draw), "NUMPY": _FixedGenerator(draw)}
            patches.append(mock.patch.dict(vars(module), both))
        if "meter" in vars(part):
            for name in ("rng", "numpy"):
                vars(part)[name] = _FixedGenerator(draw)
            vars(part)["meter"].rng = _FixedGenerator(draw)
    for patch in patches:
        patch.start()
    try:
        with _Fixed(draw):
            yield
    finally:
        for patch in reversed(patches):
            patch.stop()


Result = dict[str, Tensor]
Passes = Callable[[Any, Tensor], dict[str, Tensor]]


def alone(model: Any, images: Tensor) -> dict[str, Tensor]:
    """A model's own output."""
    return {"": model(images.clone())}


def steps(net: nn.Module, passes: Passes, draw: float) -> Result:
    """Outputs, gradients and buffers of two training passes and one in evaluation mode."""
    found: Result = {}
    module = next(sys.modules[type(m).__module__] for m in net.modules() if type(m).__name__ == "Net")
    module.STATE["calls"] = 0
    for part in net.modules():
        if hasattr(type(part), "calls") and hasattr(part, "meter"):
            del type(part).calls
    for i, training in enumerate((True, True, False)):
        net.train(training)
        generator = torch.Generator().manual_seed(i)
        images = torch.randn(4, *SIZE, dtype=torch.double, generator=generator)
        with fixed(draw, net), torch.set_grad_enabled(training):
            outputs = passes(net, images)
        terms = [(out * (torch.arange(out.numel()).view_as(out) % 7 - 3)).sum() for out in outputs.values()]
        if training and terms and sum(terms).requires_grad:  # type: ignore[union-attr]
            sum(terms).backward()  # type: ignore[union-attr]
        found |= {f"output {i} {name}": out.detach() for name, out in outputs.items()}
    found |= {f"gradient {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    found |= {f"value {n}": p.detach().clone() for n, p in net.named_parameters()}
    found |= {f"buffer {n}": b.clone() for n, b in net.named_buffers(remove_duplicate=False)}
    return found


def unlike(one: Result, two: Result, bound: float) -> str:
    """The first thing that is not the same; empty if nothing is."""
    largest = max((float(v.abs().max()) for n, v in one.items() if n.startswith("gradient")), default=0.0)
    for name in [*one, *(name for name in two if name not in one)]:
        a, b = one.get(name), two.get(name)
        if a is None or b is None:
            there = b if a is None else a
            if name.startswith("gradient") and there is not None and not there.any():
                continue
            return f"{name} is missing"
        if a.shape != b.shape:
            return f"{name} has another shape"
        scale = max(float(a.abs().nan_to_num().max()), 0.01 * largest if name.startswith("gradient") else 0, 1e-9)
        if not torch.allclose(a, b, rtol=bound, atol=bound * scale, equal_nan=True):
            return name
    return ""


def of_base(found: Result) -> Result:
    """What concerns the base-model in a family, by the model's names."""
    ours = {}
    for name, value in found.items():
        kind, _, rest = name.partition(" ")
        if kind == "output":
            ours[name] = value
        elif rest.startswith("base."):
            ours[f"{kind} {rest.removeprefix('base.')}"] = value
    return ours


def in_turn(net: Any, images: Tensor) -> dict[str, Tensor]:
    """Each model alone, as a joint pass has them."""
    outputs = {}
    for name in net.names:
        with net.in_turn(name, net.names):
            outputs[name] = net(images.clone(), which=name)
    return outputs


def prepare(net: detachnet.DetachableNet) -> None:
    """Write all passes, so that none is written while random numbers are fixed."""
    for training in (True, False):
        net.train(training)
        for models in (*((name,) for name in net.names), net.names):
            net.prepare(models)


_TORCHS = ("_modules", "_parameters", "_buffers", *(name for name in vars(nn.Module()) if "hooks" in name))


@contextmanager
def as_new(net: nn.Module) -> Iterator[nn.Module]:
    """A network that is afterwards as before, plain attributes too; a copy of a family would be traced again."""
    parts = [part for part in net.modules() if not isinstance(part, detachnet.DetachableNet)]
    plain = [(vars(p), copy.deepcopy({k: v for k, v in vars(p).items() if k not in _TORCHS})) for p in parts]
    held = [(part._buffers, dict(part._buffers)) for part in net.modules()]
    values = [(t, t.detach().clone()) for t in [*net.parameters(), *net.buffers()]]
    try:
        yield net
    finally:
        for own, kept in [*plain, *held]:
            for name in [name for name in own if name not in kept and name not in _TORCHS]:
                del own[name]
            own.update(kept)
        for tensor, value in values:
            tensor.data.copy_(value)
        net.zero_grad()


def judge(source: str, name: str, cuts: Any) -> tuple[str, str]:
    """What became of one network, and what is to be said of it: equal, refused, named, silent, broken or unfit."""
    draws = DRAWS if RANDOM_WORDS.search(source.replace(HEADER, "")) else DRAWS[:1]
    try:
        model = build(source, name)
        for draw in draws:
            steps(copy.deepcopy(model), alone, draw)
    except Exception as error:  # the network itself does not run
        return "unfit", f"{type(error).__name__}: {error}".splitlines()[0]
    pristine, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    try:
        net = detachnet.make_detachable(model, cuts, SIZE)
    except detachnet.DetachNetError as error:
        return "refused", str(error)
    except Exception as error:
        return "broken", f"{type(error).__name__}: {error}".splitlines()[0]
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    changed += [
        f"{path}.{key}"
        for (path, one), (_, two) in zip(model.named_modules(), pristine.named_modules(), strict=True)
        for key in ("steps", "scale", "seen")
        if getattr(one, key, 0) != getattr(two, key, 0)
    ]
    if changed:
        return "silent", f"make_detachable changed {changed[0]}"
    bound = 5e-2 if "bfloat16" in source else 1e-6
    try:
        said = compared(pristine, net, bound, draws)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    if not said:
        return "equal", ""
    told = [*net.plan.hints, net.plan.checked]
    known = SAID_JOINT if said.startswith("joint") else SAID
    return "named" if any(map(known.search, told)) else "silent", f"{said} | {' | '.join(told)}"


def compared(pristine: nn.Module, net: detachnet.DetachableNet, bound: float, draws: Sequence[float]) -> str:
    """How a family differs from its model, or joint passes from separate ones; empty if in nothing."""
    prepare(net)
    ways: tuple[Passes, ...] = (
        lambda net, x: {"": net(x.clone(), which="base")},
        lambda net, x: net(x.clone(), which="all"),
        in_turn,
    )
    for draw in draws:
        model = steps(copy.deepcopy(pristine), alone, draw)
        found = []
        for way in ways:
            with as_new(net):
                found.append(steps(net, way, draw))
        base, joint, apart = found
        if difference := unlike(model, of_base(base), bound):
            return f"base: {difference} at {draw}"
        if difference := unlike(apart, joint, bound):
            return f"joint: {difference} at {draw}"
    return ""


def written(seed: int) -> tuple[str, list[str]]:
    """A network's source and the cuts to try."""
    writer = Writer(seed)
    source = writer.module()
    return source, writer.rng.choice((["stem"], ["stem"], ["stem", "conv"], ["part0"], ["conv"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=1000, help="networks that run by themselves")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--only", type=int, help="show this seed's source and what became of it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("detachnet").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.only is not None:
        source, cuts = written(options.only)
        print(source.replace(HEADER + HELPERS, ""), cuts)
        print(*judge(source, f"corpus_{options.only}", cuts))
        return
    counts, seed = Counter[str](), options.seed
    while counts.total() - counts["unfit"] < options.nets:
        source, cuts = written(seed)
        verdict, said = judge(source, f"corpus_{seed}", cuts)
        counts[verdict] += 1
        if verdict in ("silent", "broken", "named"):
            print(seed, verdict, cuts, said[:400], flush=True)
        elif verdict == "refused":
            print(seed, verdict, said.splitlines()[0], flush=True)
        sys.modules.pop(f"corpus_{seed}", None)
        seed += 1
    print(dict(counts), flush=True)


if __name__ == "__main__":
    main()
