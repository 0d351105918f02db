"""What joins the images of a batch is found by running it; joint passes equal separate ones whatever it is."""

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import detachnet
from detachnet.surgery.coupling import Verdict
from tests.helpers import assert_joint_equals_separate, nightly_but

Mix = Callable[[Tensor], Tensor]


class Mixed(nn.Module):
    """conv, batch norm, a function of the feature map, conv, a function of `(B, 8)`, fc."""

    def __init__(self, vectors: Mix | None = None, maps: Mix | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        self.vectors, self.maps = vectors or nn.Identity(), maps or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(self.bn(self.conv1(x)).relu())
        logits: Tensor = self.fc(self.vectors(self.conv2(x).mean((2, 3))))
        return logits


class BatchFormer(nn.Module):
    """Attention over the images of a batch, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x.unsqueeze(1)).squeeze(1) if self.training else x
        return mixed


class Queue(nn.Module):
    """Attends to the vectors of the batches before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.ones(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        queue = self.queue.clone()
        out = x + (x @ queue).softmax(1) @ queue.t()
        if self.training:
            self.queue.copy_(torch.cat([x.detach().t(), self.queue], 1)[:, :6])
        return out


def own_norm(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, (0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def ghost_norm(x: Tensor) -> Tensor:
    return torch.cat([own_norm(group) for group in x.chunk(2)])


def along_the_batch(x: Tensor) -> Tensor:
    return F.avg_pool3d(x.transpose(0, 1), (3, 1, 1), 1, (1, 0, 0)).transpose(0, 1)


VECTORS: dict[str, Mix] = {
    "attention over the batch": BatchFormer(),
    "queue": Queue(),
    "mean": lambda v: v - v.mean(-2, keepdim=True),
    "softmax": lambda v: v * v.softmax(-2),
    "var_mean": lambda v: v - torch.var_mean(v, dim=0)[1],
    "matmul": lambda v: (v @ v.t()).softmax(1) @ v,
    "roll": lambda v: v + v.roll(1, 0),
    "slice": lambda v: v - v[:1],
    "mean of the transposed": lambda v: v - v.t().mean(1),
    "logsumexp": lambda v: v - torch.logsumexp(v, 0),
    "cdist": lambda v: v + torch.cdist(v, v).sum(1, keepdim=True),
    "flip": lambda v: 0.3 * v + 0.7 * torch.flip(v, dims=[0]),
    "cov": lambda v: v @ torch.cov(v.t()),
    "corrcoef": lambda v: v @ torch.corrcoef(v.t()),
    "einsum to no batch": lambda v: v @ torch.einsum("bi,bj->ij", v, v),
    "einsum over two batches": lambda v: torch.einsum("bi,ci,cj->bj", v, v, v),
    "bmm": lambda v: torch.bmm(v[None], v.t()[None])[0] @ v,
    "sort": lambda v: v.sort(0)[0],
    "sort by name": lambda v: v.sort(0).values,
    "topk": lambda v: v + v.topk(1, 0)[0],
    "cumsum": lambda v: v.cumsum(0),
    "normalize": lambda v: F.normalize(v, dim=0),
    "position in the batch": lambda v: v + torch.arange(v.shape[0], dtype=v.dtype)[:, None],
    "size of the batch": lambda v: v * v.shape[0],
    "share of the batch": lambda v: v / v.shape[0],
    "another axis": lambda v: v + v.view(-1, 1, 8).transpose(0, 1).flip(1).transpose(0, 1).reshape(-1, 8),
}
MAPS: dict[str, Mix] = {
    "own norm": own_norm,
    "ghost norm": ghost_norm,
    "pool along the batch": along_the_batch,
    "instance norm": F.instance_norm,
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
}


def family(model: nn.Module) -> detachnet.DetachableNet:
    return detachnet.make_detachable(model.double(), ["conv1"], (3, 8, 8), check="none")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VECTORS, *MAPS])
def test_joint_equals_separate(name: str) -> None:
    net = family(Mixed(copy.deepcopy(VECTORS.get(name)), MAPS.get(name)))
    images = torch.randn(4, 3, 8, 8, dtype=torch.double)
    net.eval()
    joint = net(images, which="all")
    for model in net.names:
        torch.testing.assert_close(joint[model], net(images, which=model), rtol=1e-12, atol=1e-12)
    assert_joint_equals_separate(net, images)


def shuffled(v: Tensor) -> Tensor:
    return v + v[torch.randperm(v.shape[0])]


def shuffled_by_sorting(v: Tensor) -> Tensor:
    return v + v[torch.rand(v.shape[0]).argsort()]


def mix_style(x: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    other = mean[torch.randperm(x.shape[0])]
    return x - 0.4 * mean + 0.4 * other


@pytest.mark.parametrize(
    "model", [Mixed(shuffled), Mixed(shuffled_by_sorting), Mixed(None, mix_style)], ids=["perm", "sort", "style"]
)
def test_shuffled_batches(model: nn.Module) -> None:
    net = family(model).train()
    images = torch.randn(6, 3, 8, 8, dtype=torch.double)
    torch.manual_seed(1)
    joint = net(images, which="all")
    for name in net.names:
        torch.manual_seed(1)
        torch.testing.assert_close(joint[name], net(images, which=name), rtol=1e-12, atol=1e-12)


PER_IMAGE: dict[str, Mix] = {
    "heads in front": lambda v: (
        v.view(-1, 2, 4).transpose(0, 1).reshape(-1, 4).sin().view(2, -1, 4).mean(0).repeat(1, 2)
    ),
    "heads behind": lambda v: v.view(-1, 4).softmax(1).view(-1, 8),
    "grouped": lambda v: F.conv1d(
        v.reshape(1, -1, 2), v.new_ones(v.shape[0] * 4, 1, 1), groups=v.shape[0] * 4
    ).view(-1, 8),
    "one hot": lambda v: v * F.one_hot(v.argmax(1), 8),
    "gather": lambda v: v.gather(1, v.argsort(1)),
    "named": lambda v: v.view(-1, 4, 2).max(2).values.repeat(1, 2),
    "drop": lambda v: F.dropout(v, 0.5),
    "random rows": lambda v: v * torch.rand(v.shape[0], 1, dtype=v.dtype),
    "in place": lambda v: v.clone().mul_(2).clamp_(0),
}


@pytest.mark.parametrize("name", PER_IMAGE)
def test_what_treats_each_image_alone_runs_once(name: str) -> None:
    net = family(Mixed(PER_IMAGE[name])).eval()
    net(torch.randn(4, 3, 8, 8, dtype=torch.double), which="all")
    assert set(net._derived.of_base[False].coupling.found.values()) == {Verdict("once")}


COMMON = {
    "torchvision:resnet18": "layer2",
    "torchvision:mobilenet_v3_small": "features.4",
    "torchvision:swin_t": "features.1",
    "torchvision:shufflenet_v2_x0_5": "stage2",
    "torchvision:efficientnet_b0": "features.2",
    "torchvision:densenet121": "features.transition1",
    "torchvision:convnext_tiny": "features.1",
    "timm:levit_128s": "stages.0",
    "timm:vit_tiny_patch16_224": "blocks.2",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", nightly_but(["torchvision:resnet18", "torchvision:shufflenet_v2_x0_5", "torchvision:swin_t"], COMMON)
)
def test_of_common_networks_only_batch_norms_run_model_by_model(name: str) -> None:
    size = 224 if name.startswith("timm:") else 64
    net = detachnet.make_detachable(detachnet.create_model(name), [COMMON[name]], (3, size, size), check="none")
    source = net._derived.of_base[True]
    source.find_coupling(net)
    norms = {
        node
        for node in source.traced.live
        if node.op == "call_module" and isinstance(net.get_submodule(str(node.target)), _BatchNorm)
    }
    inside = {
        node
        for node in source.traced.live
        if node.op == "call_module"
        and any(isinstance(part, _BatchNorm) for part in net.get_submodule(str(node.target)).modules())
    }
    assert norms <= {node for node, verdict in source.coupling.found.items() if verdict.how != "once"} == inside


def centered(module: nn.Module, given: object, out: Tensor) -> Tensor:
    return out - out.mean(0, keepdim=True)


def of_norm_one(module: nn.Module, given: object, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(gradient / gradient.norm() for gradient in gradients)


def test_what_another_forward_of_a_layer_joins() -> None:
    """Of a class that treats each image by itself."""
    model = Mixed().double()

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        out = self._conv_forward(x, self.weight, self.bias)
        return nn.functional.dropout(out - out.mean(0, keepdim=True), 1e-9, self.training)

    model.conv2.forward = types.MethodType(forward, model.conv2)  # type: ignore[method-assign]
    net = detachnet.make_detachable(model, ["conv1"], (3, 8, 8)).train()
    images = torch.randn(4, 3, 8, 8, dtype=torch.double)
    for name, output in net(images, which="all").items():
        torch.testing.assert_close(output, net(images, which=name))


@pytest.mark.parametrize("when", ["before", "later"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_what_hooks_of_layers_join(kind: str, when: str) -> None:
    """They see the images of all models at once where a layer runs once."""

    def hook(model: nn.Module) -> None:
        conv: nn.Module = model.conv2  # type: ignore[assignment]
        if kind == "forward":
            conv.register_forward_hook(centered)  # type: ignore[arg-type]
        else:
            conv.register_full_backward_hook(of_norm_one)  # type: ignore[arg-type]

    model = Mixed().double()
    if when == "before":
        hook(model)
    net = detachnet.make_detachable(model, ["conv1"], (3, 8, 8), check="none")
    images = torch.randn(4, 3, 8, 8, dtype=torch.double)
    net(images, which="all")
    if when == "later":
        hook(net.base)
    gradients = []
    together = net(images, which="all")
    alone = {name: net(images, which=name) for name in net.names}
    torch.testing.assert_close(together, alone)
    for outputs in (together, alone):
        net.zero_grad()
        sum(out.square().sum() for out in outputs.values()).backward()  # type: ignore[union-attr]
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_finding_leaves_the_random_state_and_the_family_alone() -> None:
    net = family(Mixed(shuffled)).train()
    before, state = torch.get_rng_state(), copy.deepcopy(net.state_dict())
    for mode in (True, False):
        net._derived.of_base[mode].find_coupling(net)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_models_that_run_one_after_another_get_the_image_as_it_was() -> None:
    class InPlace(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            x.sub_(0.5)
            return super().forward(x)

    net = detachnet.make_detachable(InPlace(lambda v: v - v.mean()).double(), ["conv1"], (3, 8, 8)).eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.double)
    joint = net(images.clone(), which="all")
    for name in net.names:
        torch.testing.assert_close(joint[name], net(images.clone(), which=name))


def test_without_weights_nothing_is_found() -> None:
    net = detachnet.make_detachable(Mixed(shuffled).to("meta"), ["conv1"], (3, 8, 8))
    net._derived.of_base[True].find_coupling(net)
    assert not net._derived.of_base[True].is_found
