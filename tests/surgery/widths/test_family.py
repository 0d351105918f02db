"""Sub-models with fewer filters: the family's views, its gradients and its files against plain small networks."""

import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import detachnet
from detachnet import SubModel
from detachnet.losses import MultiModelLoss, logits
from detachnet.surgery.layout import image_layout
from detachnet.surgery.recalibration import recalibrate
from detachnet.surgery.trace import trace
from detachnet.surgery.turns import Turns
from detachnet.surgery.widths.choice import choose
from detachnet.surgery.widths.order import important
from detachnet.surgery.widths.propagation import find_channels
from detachnet.surgery.widths.reading import SlicedLayer
from detachnet.surgery.widths.slicing import slice_model
from detachnet.surgery.widths.storing import restore, store
from detachnet.training.step import TrainingStep
from tests import models
from tests.helpers import nightly_but, without_dropout
from tests.widths import randomize

NETWORKS = {
    "detachnet:vgg16_cifar": 32,
    "torchvision:resnet18": 32,
    "torchvision:mobilenet_v3_small": 32,
    "timm:test_efficientnet": 64,
    "torchvision:densenet121": 32,
    "torchvision:shufflenet_v2_x0_5": 32,
    "timm:convnext_atto": 64,
    "timm:nf_resnet26": 64,
    "timm:convnextv2_atto": 64,
    "timm:res2net50_26w_4s": 64,
    "torchvision:googlenet": 64,
    "timm:test_convnext": 32,
    "timm:test_nfnet": 32,
    "timm:densenet121 thin": 32,
    "timm:convnextv2_atto thin": 32,
    "timm:res2net50_26w_4s thin": 32,
}
THIN: dict[str, dict[str, Any]] = {
    "detachnet:vgg16_cifar": {"width": 0.25},
    "timm:densenet121 thin": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "timm:convnextv2_atto thin": {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)},
    "timm:res2net50_26w_4s thin": {"layers": (1, 1, 1, 1)},
}
USUAL = (
    *("detachnet:vgg16_cifar", "timm:test_efficientnet", "timm:test_convnext", "timm:test_nfnet"),
    *("timm:densenet121 thin", "timm:convnextv2_atto thin", "timm:res2net50_26w_4s thin"),
)
FEW = ("detachnet:vgg16_cifar", "timm:densenet121 thin", "timm:convnextv2_atto thin")
SUBS: dict[str, Any] = {"half": SubModel(width=0.5), "best": SubModel(width=0.75, filters="important")}


def base(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    model = detachnet.create_model(name.partition(" ")[0], num_classes=10, **THIN.get(name, {})).double()
    return without_dropout(randomize(model)).eval(), (3, NETWORKS[name], NETWORKS[name])


def images(size: tuple[int, ...], count: int = 3) -> Tensor:
    return torch.randn(count, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@cache
def small_family() -> detachnet.DetachableNet:
    """Two widths, and two routes of one of them."""
    model, size = base("detachnet:vgg16_cifar")
    subs = SUBS | {
        "front": SubModel(drop=[":features.6"], width=0.5),
        "late": SubModel(drop=["features.16:features.22"], width=0.5),
        "cut": SubModel(drop=[":features.6"]),
    }
    return detachnet.make_detachable(model, subs, size)


def family() -> detachnet.DetachableNet:
    return copy.deepcopy(small_family())


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(USUAL, NETWORKS))
def test_attached_is_detached_is_the_reference(name: str) -> None:
    model, size = base(name)
    net = detachnet.make_detachable(model, SUBS, size, check="none")
    assert set(net.base.state_dict()) == set(model.state_dict())
    assert {key.partition(".")[0] for key in net.state_dict()} <= {"base", "norms"}
    traced = trace(model, size)
    channels = find_channels(traced)
    x = images(size)
    with torch.no_grad():
        every = net(x, which="all")
        assert torch.equal(logits(every["base"]), logits(model(x)))
        for sub, width in (("half", 0.5), ("best", 0.75)):
            kept = choose(channels, width, important(model, channels) if sub == "best" else None)
            reference = slice_model(model, traced, kept)
            detached = net.detach(sub)
            expected = logits(reference(x))
            assert torch.equal(logits(detached(x)), expected)
            torch.testing.assert_close(logits(net(x, which=sub)), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(logits(every[sub]), expected, rtol=1e-12, atol=1e-12)
            plan = net.plan[sub]
            assert (plan.macs, plan.num_params) == (kept.macs, kept.num_params)
            assert plan.num_params == sum(p.numel() for p in detached.parameters())
            assert all(p.is_contiguous() for p in detached.parameters())
            assert detached.state_dict().keys() == reference.state_dict().keys()
            assert detached.state_dict().keys() <= model.state_dict().keys()
            assert plan.shared_macs == 0
            with FlopCounterMode(display=False) as counter:
                detached(x[:1])
            assert plan.macs == counter.get_total_flops() // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(FEW, NETWORKS))
def test_gradients_are_the_small_networks_put_back(name: str) -> None:
    """A joint pass, separate passes, and detached networks whose gradients are scattered into the base-model's."""
    model, size = base(name)
    net = detachnet.make_detachable(model, SUBS, size, check="none").train()
    x, target = images(size), torch.arange(3)
    apart = copy.deepcopy(net)
    sum(F.cross_entropy(logits(out), target) for out in net(x, which="all").values()).backward()
    for sub in apart.names:
        F.cross_entropy(logits(apart(x, which=sub)), target).backward()
    expected = {key: torch.zeros_like(p) for key, p in net.named_parameters()}
    for sub in net.names:
        alone = copy.deepcopy(apart)
        alone.zero_grad()
        F.cross_entropy(logits(alone(x, which=sub)), target).backward()
        for key, p in alone.named_parameters():
            expected[key] += 0 if p.grad is None else p.grad
    for (key, one), (_, two) in zip(net.named_parameters(), apart.named_parameters(), strict=True):
        for grad in (one.grad, two.grad):
            grad = torch.zeros_like(one) if grad is None else grad
            assert (grad - expected[key]).norm() <= 1e-12 * max(1.0, float(expected[key].norm())), key
    for (key, one), (_, two) in zip(net.named_buffers(), apart.named_buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("sub", ["half", "best"])
def test_a_small_networks_gradients_scattered_back(sub: str) -> None:
    """In training mode, with statistics: the plain small network against the family, weight by weight."""
    model, size = base("detachnet:vgg16_cifar")
    net = detachnet.make_detachable(model, SUBS, size, check="none").train()
    small = net.detach(sub).train()
    x, target = images(size), torch.arange(3)
    F.cross_entropy(net(x, which=sub), target).backward()
    F.cross_entropy(small(x), target).backward()
    channels = find_channels(trace(model, size))
    kept = restore(channels, net.plan[sub].kept)
    checked = 0
    for path, layer in channels.layers.items():
        if layer.makes is None:
            continue
        weight, part = net.get_submodule(path).weight, small.get_submodule(path.removeprefix("base.")).weight
        rows, columns = kept.indices(layer.makes), kept.indices(layer.reads)
        whole = torch.zeros_like(weight)
        whole[rows[:, None], columns[None]] = part.grad
        torch.testing.assert_close(weight.grad, whole, rtol=1e-12, atol=1e-12)
        checked += 1
    assert checked == 14
    own = getattr(net.norms, {"half": "half_"}.get(sub, sub))
    for key, value in own.state_dict().items():
        torch.testing.assert_close(value, small.state_dict()[key], rtol=1e-12, atol=1e-12)
        assert "num_batches" not in key or value == 1
    for key, p in own.named_parameters():
        torch.testing.assert_close(p.grad, dict(small.named_parameters())[key].grad, rtol=1e-12, atol=1e-12)
    assert all(v == 0 for k, v in net.base.state_dict().items() if "num_batches" in k)


@pytest.mark.slow
def test_models_of_one_width_share_a_pass() -> None:
    net = family().train()
    apart = copy.deepcopy(net)
    x, target = images((3, 32, 32)), torch.arange(3)
    calls = []
    net.slices.half_.features.get_submodule("24").register_forward_hook(lambda *_: calls.append(1))
    out = net(x, which="all")
    assert len(calls) == 1  # half, front and late
    assert list(out) == list(net.names)
    sum(F.cross_entropy(o, target) for o in out.values()).backward()
    turns = Turns(apart, apart.names)
    for sub in apart.names:
        with turns.of(sub):
            one = apart(x, which=sub)
        torch.testing.assert_close(out[sub], one, rtol=1e-12, atol=1e-12)
        F.cross_entropy(one, target).backward()
    for (key, p), (_, q) in zip(net.named_parameters(), apart.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=key)
    for (key, p), (_, q) in zip(net.named_buffers(), apart.named_buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.slow
def test_routes_and_widths_together() -> None:
    net = family().eval()
    x = images((3, 32, 32))
    with torch.no_grad():
        for sub in net.names:
            out = net(x, which=sub)
            assert torch.equal(net.detach(sub)(x), out)
            assert torch.equal(net.detach(sub, share=True)(x), out)
            torch.testing.assert_close(net(x, which="all")[sub], out, rtol=1e-12, atol=1e-12)
            value = x
            for leg in net.legs[sub]:
                value = net.detach_leg(leg)(value)
            torch.testing.assert_close(value, out, rtol=1e-12, atol=1e-12)
    assert net.stepdowns.front.weight.shape[0] == 8
    assert net.plan["front"].stepdown.feature == (8, 16, 16)
    outputs, features = net(x, which="all", features=True)
    assert list(outputs) == list(net.names)
    assert set(features) == {"cut"}
    joint = net.plan.joint_macs
    assert joint < sum(m.macs for m in net.plan.models)
    assert joint > sum(net.plan[m].macs for m in ("base", "half", "best"))


@pytest.mark.slow
def test_the_order_of_the_answers() -> None:
    net = family().eval()
    assert list(net(images((3, 32, 32)), which=("base", "best", "cut"))) == ["base", "best", "cut"]
    with pytest.raises(detachnet.CutError, match="name each model once and in order"):
        net(images((3, 32, 32)), which=("best", "half"))


@pytest.mark.slow
def test_copies_read_their_own_weights() -> None:
    net = family().eval()
    x = images((3, 32, 32))
    out = net(x, which="half").detach()
    other = copy.deepcopy(net)
    pickled = pickle.loads(pickle.dumps(net))
    with torch.no_grad():
        net.base.features[3].weight.zero_()
    for copied in (other, pickled):
        assert torch.equal(copied(x, which="half"), out)
        layer = copied.slices.half_.features.get_submodule("3")
        assert isinstance(layer, SlicedLayer)
        assert layer.layer is copied.base.features[3]
    assert not torch.equal(net(x, which="half"), out)
    single = other.float()(x.float(), which="half")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), out, rtol=1e-3, atol=1e-3)
    assert "some channels of Conv2d" in repr(net.slices.half_)


def test_nothing_is_owned_twice() -> None:
    net = family()
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert not [name for name in [*names, *net.state_dict()] if name.startswith("slices")]
    assert len(names) == len(set(names))
    assert {p for p in net.parameters_of(["half"]) if p.startswith("base.")} == {
        f"base.{name}" for name, p in net.base.named_parameters() if p.ndim > 1 or not _is_norm(net.base, name)
    }


def _is_norm(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)


@pytest.mark.slow
def test_private_heads() -> None:
    model, size = base("torchvision:resnet18")
    net = detachnet.make_detachable(
        model, {"half": SubModel(width=0.5)}, size, head="private", check="none"
    ).eval()
    assert net.heads.half_.fc.weight.shape == (10, 256)
    assert torch.equal(net.heads.half_.fc.weight, model.get_submodule("fc").weight[:, :256])
    x = images(size)
    assert torch.equal(net.detach("half")(x), net(x, which="half"))
    net(x, which="half").sum().backward()
    assert net.base.fc.weight.grad is None


@pytest.mark.slow
def test_groups_of_filters() -> None:
    model, size = base("torchvision:resnet18")
    subs = {"a": SubModel(width={"layer4.0.conv1": 0.5, "layer1.0.conv1": 0.25})}
    net = detachnet.make_detachable(model, subs, size, check="outputs").eval()
    assert net.plan["a"].kept == {"layer1.0.conv1": 16, "layer4.0.conv1": 256}
    assert "layer4.0.conv1 0.5 and 1 more" in str(net.plan)
    x = images(size)
    assert torch.equal(net.detach("a")(x), net(x, which="a"))


@pytest.mark.slow
@pytest.mark.parametrize("which", nightly_but(["best", "front"], ["half", "best", "front", "late"]))
def test_files(which: str, tmp_path: Path) -> None:
    net = family().eval()
    x = images((3, 32, 32))
    out = net(x, which=which)
    detachnet.save(net, tmp_path / "one", which=which)
    alone = detachnet.load(tmp_path / "one")
    assert torch.equal(alone(x), out)
    detachnet.save(net, tmp_path / "all")
    again = detachnet.load(tmp_path / "all")
    assert again.plan == net.plan
    assert torch.equal(again(x, which=which), out)


@pytest.mark.slow
def test_a_choice_that_does_not_fit(tmp_path: Path) -> None:
    model, size = base("torchvision:resnet18")
    channels = find_channels(trace(model, size))
    stored = store(channels, choose(channels, 0.5))
    assert store(channels, restore(channels, stored)) == stored
    with pytest.raises(detachnet.WidthError, match=r"stored width is of filters 'conv2'") as caught:
        restore(channels, {"conv2": 32})
    assert "conv1" in caught.value.candidates
    for wrong in (0, 65, "g", "0", "1" + 16 * "0"):
        with pytest.raises(detachnet.WidthError, match=r"a stored width keeps .* of 'conv1', which has 64"):
            restore(channels, {"conv1": wrong})
    shuffle, size = base("torchvision:shufflenet_v2_x0_5")
    channels = find_channels(trace(shuffle, size))
    names = [g.name for g in detachnet.find_widths(shuffle, size) if not g.reason and g.units > 16]
    with pytest.raises(detachnet.WidthError, match="a stored width does not fit the network: '"):
        restore(channels, dict.fromkeys(names, "5"))
    net = detachnet.make_detachable(model, {"half": SubModel(width=0.5)}, (3, 32, 32), check="none")
    detachnet.save(net, tmp_path / "net", own=True)
    with pytest.raises(detachnet.CheckpointError, match="it was made from another model"):
        detachnet.load(tmp_path / "net", model=shuffle)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"width": 0.0}, r"width=0\.0: .*a width is a share of the filters, in \(0, 1\]"),
    ({"width": 1.5}, r"width=1\.5: .*in \(0, 1\]"),
    ({"width": {"conv1": -1}}, r"width=.*in \(0, 1\]"),
    ({"width": "wide"}, "width='wide'[)]: it must be a number or a table"),
    ({"width": 0.5, "filters": "best"}, "filters='best'[)]: it must be one of 'first' or 'important'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(detachnet.WidthError, match=message):
        SubModel(**fields)


@pytest.mark.parametrize("fields", [{}, {"width": 1.0}, {"drop": []}, {"filters": "important"}])
def test_nothing_left_out(fields: dict[str, Any]) -> None:
    with pytest.raises(detachnet.CutError, match="this is the base-model"):
        SubModel(**fields)


@pytest.mark.slow
def test_refused_widths() -> None:
    model, size = base("torchvision:resnet18")

    def make(width: Any, **kwargs: Any) -> None:
        subs = {f"w{i}": SubModel(width=w) for i, w in enumerate(width)}
        detachnet.make_detachable(model, subs, size, check="none", **kwargs)

    with pytest.raises(detachnet.WidthError, match=r"there are no filters 'layer1\.0\.conv3'") as caught:
        make([{"layer1.0.conv3": 0.5}])
    assert "layer1.0.conv1" in caught.value.candidates
    with pytest.raises(detachnet.WidthError, match="w0 cannot share the base-model's batch norms") as caught:
        make([0.5], norm="shared")
    assert "norm='private'" in str(caught.value)
    with pytest.raises(detachnet.CutError, match=r"w0 and w1 leave out the same: width=0\.5"):
        make([0.5, 0.5001])
    with pytest.raises(
        detachnet.WidthError, match=r"w0 would have all filters of the base-model: with width=0\.999"
    ):
        make([0.999])
    with torch.device("meta"):
        bare = detachnet.create_model("torchvision:resnet18")
    with pytest.raises(detachnet.WidthError, match="filters='important' needs the model's weights"):
        detachnet.make_detachable(bare, {"a": SubModel(width=0.5, filters="important")}, size, check="none")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["shared", "private"])
def test_norms_without_statistics_are_the_base_models(norm: Any) -> None:
    """Layer norms have none: each model normalizes over what it has, with the base-model's gains."""
    model, size = base("timm:convnext_atto")
    net = detachnet.make_detachable(model, {"half": SubModel(width=0.5)}, size, norm=norm, check="none").eval()
    assert net.plan["half"].own_params == 0
    x = images(size)
    assert torch.equal(net.detach("half")(x), net(x, which="half"))
    assert {key.partition(".")[0] for key in net.state_dict()} == {"base"}


def test_the_plan() -> None:
    plan = small_family().plan
    assert "hint: best answers at chance until its norms are recalibrated or it is trained" in str(plan)
    assert sum("at chance" in hint for hint in plan.hints) == 1
    assert "0.75, important" in str(plan)
    assert plan["half"].kept["features.0"] == 8
    assert isinstance(plan["best"].kept["features.7"], str)
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan
    row = next(line for line in str(plan).splitlines() if line.startswith("half"))
    assert row.split()[1:6] == ["0.5", "5.1", "M", "26", "%"]
    assert row.split()[6] == "0"


@pytest.mark.slow
def test_recalibration() -> None:
    net = family()
    batches = [images((3, 32, 32), 8) for _ in range(2)]
    fresh = recalibrate(net, batches)
    norm = fresh.norms.half_.features.get_submodule("1")
    seen = torch.stack([fresh.slices.half_.features.get_submodule("0")(x).mean((0, 2, 3)) for x in batches])
    torch.testing.assert_close(norm.running_mean, seen.mean(0))
    assert not torch.equal(net.norms.half_.features.get_submodule("1").running_mean, norm.running_mean)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", nightly_but(["joint"], ["joint", "separate"]))
def test_training(strategy: Any) -> None:
    """A few steps of both strategies change all models, alike."""
    torch.manual_seed(0)
    net = family().train()
    loss = MultiModelLoss(distillation=0.5)
    step = TrainingStep(net, net.names, loss, torch.optim.SGD(net.parameters(), 0.02), strategy=strategy)
    x, target = images((3, 32, 32), 8), torch.arange(8) % 3
    losses = torch.stack([step(x, target) for _ in range(12)])
    assert (losses[-1] < 0.6 * losses[0]).all(), losses


@pytest.mark.slow
def test_strategies_give_the_same_gradients() -> None:
    x, target = images((3, 32, 32), 4), torch.arange(4)
    nets = [family().train() for _ in range(2)]
    for net, strategy in zip(nets, ("joint", "separate"), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        TrainingStep(net, net.names, MultiModelLoss(), optimizer, strategy=strategy).add_gradients(x, target)
    for (key, p), (_, q) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=key)


def test_thin_convolutions_of_a_narrow_model(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 8, 1, 2), nn.ReLU(), nn.Conv2d(8, 2, 3)
    )
    net = detachnet.make_detachable(model, {"half": SubModel(width=0.5)}, (3, 16, 16))
    assert image_layout(net, torch.device("cpu")) == torch.contiguous_format
    assert "'2' of a narrower sub-model is a strided 1×1 convolution" in caplog.text


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    net = family().train()
    net.prepare(net.names)
    x = images((3, 32, 32))
    expected = copy.deepcopy(net)(x, which="all")
    run = torch.compile(lambda x: net(x, which=net.names), backend="eager", fullgraph=True)
    for name, out in run(x).items():
        torch.testing.assert_close(out, expected[name], rtol=1e-12, atol=1e-12)


class Reading(nn.Module):
    """Its forward reads a parameter and a buffer itself, makes a tensor, and changes the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.groups, self.act = nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.PReLU(32)
        self.gain = nn.Parameter(torch.rand(32, 1, 1) + 0.5)
        self.register_buffer("scale", torch.rand(32, 1, 1))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x.mul_(2.0)
        x = F.relu(self.norm(self.conv1(x))) * self.gain
        x = x + self.act(self.groups(self.conv2(x))) * self.scale
        x = x + torch.arange(32.0).view(32, 1, 1).to(x)
        return {"logits": self.fc(x.mean((2, 3)))}


@pytest.mark.slow
def test_tensors_that_a_forward_pass_reads_itself(tmp_path: Path) -> None:
    net = detachnet.make_detachable(Reading().double(), SUBS, (3, 16, 16)).eval()
    assert "the raw image" not in str(net.plan)  # it runs what is in front, too
    x = images((3, 16, 16))
    out = net(x, which="all")
    assert torch.equal(x, images((3, 16, 16)))
    detachnet.save(net, tmp_path / "best", which="best")
    for sub in net.names:
        alone = net.detach(sub)
        assert torch.equal(alone(x.clone())["logits"], out[sub]["logits"])
        assert torch.equal(net.detach(sub, share=True)(x.clone())["logits"], out[sub]["logits"])
        made = {"eval_tensor_constant0"} if sub != "base" else set()
        assert alone.state_dict().keys() == net.base.state_dict().keys() | made
        assert len(alone.gain) == len(alone.scale) == alone.conv1.out_channels
    assert torch.equal(detachnet.load(tmp_path / "best", model=Reading())(x)["logits"], out["best"]["logits"])
    out["half"]["logits"].sum().backward()
    assert int((net.base.gain.grad != 0).sum()) == 16


class ReadInPart(models.Around):
    """Its forward reads a row of a parameter, and a column of another."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 32, 3, 1, 1))
        self.b = nn.Conv2d(32, 16, 3, 2, 1)
        self.rows, self.columns = nn.Parameter(torch.rand(3, 32)), nn.Parameter(torch.rand(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.a(x)) * self.rows[1][:, None, None] + self.columns[:, 0, None, None]
        return self.fc(self.b(x).mean((2, 3)))


def test_of_a_parameter_that_is_read_in_part_the_rest_goes_with_it() -> None:
    net = detachnet.make_detachable(ReadInPart(), {"half": SubModel(width=0.5)}, (3, 16, 16)).eval()
    alone, x = net.detach("half"), torch.randn(2, 3, 16, 16)
    assert alone.rows.shape == (3, 16)
    assert alone.columns.shape == (16, 3)
    torch.testing.assert_close(alone(x), net(x, which="half"))


@pytest.mark.slow
def test_widths_are_short_for_sub_models() -> None:
    model = detachnet.create_model("detachnet:resnet_cifar", width=0.5)
    net = detachnet.make_detachable(model, widths=[0.75, 0.5], check="none")
    same = {"sub0": SubModel(width=0.75), "sub1": SubModel(width=0.5)}
    assert net.plan == detachnet.make_detachable(model, same, check="none").plan


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"widths": 0.5}, detachnet.WidthError, r"widths=0.5: give a list of shares[\s\S]*widths=\[0.75, 0.5\]"),
        ({"widths": []}, detachnet.WidthError, r"widths=\[\]: give a list"),
        ({"widths": [0.5, 1.0]}, detachnet.WidthError, r"1.0 is no share of the filters between 0 and 1"),
        ({"widths": [0.5, "x"]}, detachnet.WidthError, r"'x' is no share of the filters between 0 and 1"),
        ({"widths": [0.5, 0.75, 0.5]}, detachnet.WidthError, r"\[0.5, 0.75, 0.5\]: 0.5 is there twice"),
        ({"widths": [0.5, 0.501]}, detachnet.CutError, "sub0 and sub1 leave out the same: width=0.501"),
        ({"widths": [0.5], "cuts": ["layer1"]}, detachnet.CutError, "give either cuts, sub_models or widths"),
        ({"widths": [0.5], "costs": {}}, detachnet.CutError, "cuts and widths are chosen already"),
    ],
)
def test_refused_short_widths(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        detachnet.make_detachable(models.Plain(), input_size=(3, 8, 8), check="none", **options)
