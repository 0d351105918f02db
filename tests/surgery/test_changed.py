"""What is done to `net.base` after the family was made: layers replaced, fused, frozen."""

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import detachnet
from detachnet import SubModel
from detachnet.surgery import following
from tests import models

SIZE = (3, 16, 16)


@pytest.mark.parametrize("asked", [{"behind": "a"}, {"narrow": SubModel(width=0.5)}])
def test_another_head_is_every_models(asked: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Transfer learning: another number of classes."""
    net, x = (
        detachnet.make_detachable(models.Around(nn.Identity()), asked, SIZE, head="private"),
        torch.randn(4, *SIZE),
    )
    net.base.fc = nn.Linear(16, 9)
    name = net.names[1]
    for outputs in (net(x, which="all"), {each: net(x, which=each) for each in net.names}):
        assert {key: output.shape for key, output in outputs.items()} == {"base": (4, 9), name: (4, 9)}
    assert f"{name} gets a copy of the new 'fc': its own had other shapes" in caplog.text
    head = net.heads.get_submodule(f"{name}.fc")
    torch.testing.assert_close(head.bias, net.base.fc.bias)
    net(x, which=name).sum().backward()
    assert net.base.fc.bias.grad is None


def test_another_head_whose_weight_is_computed_is_every_models() -> None:
    net, x = (
        detachnet.make_detachable(models.Around(nn.Identity()), ["a"], SIZE, head="private"),
        torch.randn(4, *SIZE),
    )
    net.base.fc = nn.utils.weight_norm(nn.Linear(16, 9))
    net.base(x)  # its weight is no leaf from here on, which deepcopy refuses
    assert {key: output.shape for key, output in net(x, which="all").items()} == {"base": (4, 9), "sub0": (4, 9)}
    assert net.heads.get_submodule("sub0.fc").weight_g is not net.base.fc.weight_g


class Referring(nn.Module):
    """Kept whole; has a norm and refers to a layer that is another module's."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.norm, self.others = nn.BatchNorm2d(8), [conv]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean((1, 2, 3), keepdim=True)
        return self.norm(self.others[0](x / scale))  # type: ignore[no-any-return]


def test_a_copy_of_a_layer_refers_to_what_the_layer_refers_to() -> None:
    model = models.Around(nn.Identity())
    model.mid = nn.Sequential(nn.Conv2d(8, 8, 1))
    model.mid.append(Referring(model.mid[0]))
    net = detachnet.make_detachable(model, ["a"], SIZE)
    own = net.norms.get_submodule("sub0.mid.1")
    assert own.others == net.base.mid[1].others == [net.base.mid[0]]
    assert own.norm is not net.base.mid[1].norm
    conv, referring = net.detach("sub0").mid.children()
    assert referring.others == [conv]
    assert conv is not net.base.mid[0]


def test_another_base_model_is_the_familys() -> None:
    """An average of the weights, or the best copy, put in its place; or another model of the same layers."""
    net, x = detachnet.make_detachable(models.Around(Level()), ["a"], SIZE).eval(), torch.randn(4, *SIZE)
    before = net(x, which="all")
    net.base = copy.deepcopy(net.base)
    torch.testing.assert_close(net(x, which="all"), before)
    net.base.mid.level = 3.0
    joint = net(x, which="all")
    torch.testing.assert_close(joint["base"], net.base(x))
    assert not torch.allclose(joint["sub0"], before["sub0"])
    net.base = models.Around(nn.Tanh()).eval()
    torch.testing.assert_close(net(x), net.base(x))


class Level(nn.Module):
    """Times a number that is scheduled."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.level = nn.ReLU(), 1.0

    def forward(self, h: Tensor) -> Tensor:
        return self.act(h) * self.level  # type: ignore[no-any-return]


class Scaled(nn.Linear):
    """A head with a scale that is scheduled."""

    scale = 1.0

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(h), F.normalize(self.weight))


def test_a_private_head_follows_what_a_loop_schedules() -> None:
    model, x = models.Around(nn.Identity()), torch.randn(4, *SIZE)
    model.fc = Scaled(16, 5)
    model.fc.scale = 1.0
    net = detachnet.make_detachable(model, ["a"], SIZE, head="private").eval()
    before = net(x, which="all")
    net.base.fc.scale = 64.0
    after = net(x, which="all")
    for name in net.names:
        torch.testing.assert_close(after[name], 64 * before[name])


class Louder(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


def test_a_layer_of_another_class_is_every_models(caplog: pytest.LogCaptureFixture) -> None:
    """Of the same shapes: what a sub-model has of its own is a copy of what is there now."""
    model, x = models.Around(nn.BatchNorm2d(8)), torch.randn(4, *SIZE)
    net = detachnet.make_detachable(model, ["a"], SIZE, head="private").eval()
    net(x, which="all")
    net.base.fc, net.base.mid = Scaled(16, 5), Louder(8).eval()
    joint = net(x, which="all")
    torch.testing.assert_close(joint["base"], net.base(x))
    torch.testing.assert_close(joint["sub0"], net.detach("sub0")(x))
    own = [type(part) for place in (net.norms, net.heads) for part in place.modules()]
    assert Scaled in own
    assert Louder in own
    assert "sub0 gets a copy of the new 'fc': its own was of another class" in caplog.text
    caplog.clear()
    net.heads.sub0.fc = nn.Linear(16, 5)  # type: ignore[union-attr]  # which a user may put there
    net.base.fc.scale = 2.0
    net(x, which="all")
    assert type(net.heads.sub0.fc) is nn.Linear  # type: ignore[union-attr]


class Standardized(nn.Conv2d):
    """A convolution of a user's with a gain."""

    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_narrow_layer_follows_what_comes_later() -> None:
    asked: Any = {"narrow": SubModel(width=0.5)}
    model, x = models.Around(Standardized(8, 8, 3, 1, 1)), torch.randn(4, *SIZE)
    net = detachnet.make_detachable(model, asked, SIZE).eval()
    net(x, which="all")
    net.base.mid.gain = 3.0
    after = net(x, which="all")
    torch.testing.assert_close(after["base"], net.base(x))
    torch.testing.assert_close(after["narrow"], copy.deepcopy(net)(x, which="narrow"))
    torch.testing.assert_close(after["narrow"], net.detach("narrow")(x))


class OfBytes(models.Around):
    """Takes bytes as well as numbers."""

    def __init__(self, are_numbers: Callable[[Tensor], bool]) -> None:
        super().__init__(nn.Identity())
        self.are_numbers = are_numbers

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.are_numbers(x) else x.float() / 255)


@pytest.mark.parametrize(
    "are_numbers",
    [
        lambda x: x.dtype != torch.uint8,
        lambda x: x.dtype.is_floating_point,
        lambda x: x.is_floating_point(),
        torch.is_floating_point,
        lambda x: x.element_size() > 1,
    ],
    ids=["dtype", "of the dtype", "method", "function", "size"],
)
def test_images_of_another_kind_are_the_models_own_or_refused(are_numbers: Callable[[Tensor], bool]) -> None:
    net = detachnet.make_detachable(OfBytes(are_numbers), ["a"], SIZE).eval()
    images = torch.randint(0, 256, (4, *SIZE), dtype=torch.uint8)
    torch.testing.assert_close(net(images), net.base(images))
    with pytest.raises(
        detachnet.StepDownError,
        match=r"asks for a dtype: the family is made for torch.float32, not torch.uint8[\s\S]*example_input",
    ):
        net(images, which="all")
    net = detachnet.make_detachable(OfBytes(are_numbers), ["a"], example_input=images).eval()
    torch.testing.assert_close(net(images, which="all")["base"], net.base(images))


def test_the_name_of_a_type_is_a_question_too() -> None:
    images = torch.randint(0, 256, (4, *SIZE), dtype=torch.uint8)
    net = detachnet.make_detachable(OfBytes(lambda x: "Float" in x.type()), ["a"], example_input=images).eval()
    torch.testing.assert_close(net(images / 255), net.base(images / 255))


class AsItsWeights(models.Around):
    """Its answer has the dtype of its weights, as transformers have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(next(self.parameters()).dtype) / 3


def test_a_family_in_another_precision_is_traced_in_that() -> None:
    net = detachnet.make_detachable(AsItsWeights(nn.Identity()), ["a"], SIZE).eval()
    net(torch.randn(4, *SIZE))
    x = torch.randn(4, *SIZE, dtype=torch.double)
    joint = net.double()(x, which="all")
    torch.testing.assert_close(joint["base"], net.base(x), rtol=0, atol=0)
    assert joint["sub0"].dtype == torch.double


def test_the_plan_has_the_costs_of_what_is_there_now() -> None:
    asked: Any = {"behind": "a", "short": SubModel(drop=["a:mid"]), "narrow": SubModel(width=0.5)}
    model = models.Around(nn.Conv2d(8, 8, 3, 1, 1))
    net = detachnet.make_detachable(model, asked, SIZE, head="private")
    for changed in (net.base, model):
        changed.mid, changed.fc = nn.Conv2d(8, 8, 1), nn.Linear(16, 9)
    net(torch.randn(4, *SIZE))
    assert net.plan == detachnet.make_detachable(model, asked, SIZE, head="private").plan


def test_a_feature_of_another_size_is_refused() -> None:
    net, x = detachnet.make_detachable(models.Around(nn.Identity()), ["a"], SIZE), torch.randn(4, *SIZE)
    net.base.a = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
    net.base.b = nn.Conv2d(12, 16, 3, 2, 1)
    said = r"the feature at 'a' is 12×8×8, and what sub0 has for it 8×8×8[\s\S]*make_detachable\(net.base"
    for use in (lambda: net(x), lambda: net(x, which="all"), lambda: net.detach("sub0")):
        with pytest.raises(detachnet.StepDownError, match=said):
            use()

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(8, 8, 1), 1

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), self.size)


class Pooled(nn.Module):
    """Another size by an attribute, or by a part in another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(8, 8, 1), 1

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), self.size if self.conv.training is self.training else 2)


def differs(*_: Any) -> NoReturn:
    """What comparing ends with, after all else is done."""
    raise detachnet.TraceError("its outputs are others")


REFUSED = {
    "an attribute": r"the feature at 'mid' is 8×4×4, and what cut has",
    "a mode": r"the feature at 'mid' is 8×4×4, and what cut has",
    "a layer": "sub-models with fewer filters no longer fit",
    "a head": "its outputs are others",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_each_time_and_undone_leaves_nothing(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = models.Around(Pooled()).eval(), torch.randn(4, *SIZE)
    asked = {"cut": "mid", "narrow": SubModel(width=0.5)}
    net = detachnet.make_detachable(model, asked, SIZE, head="private")
    before, state, plan = net(x, which="all"), net.state_dict(), net.plan
    mid, fc = net.base.mid, net.base.fc
    if what == "an attribute":
        mid.size = 2
    elif what == "a mode":
        mid.conv.train()
    else:
        net.base.mid = nn.Conv2d(8, 8, 2, 2) if what == "a layer" else mid
        net.base.fc = nn.Linear(16, 9)
        monkeypatch.setattr(following, "prove", differs)
    for name in ("narrow", "base", "narrow"):
        with pytest.raises(detachnet.DetachNetError, match=REFUSED[what]):
            net(x, which=name)
    net.base.mid, net.base.fc, mid.size = mid.eval(), fc, 1
    torch.testing.assert_close(net(x, which="all"), before)
    torch.testing.assert_close({name: net(x, which=name) for name in net.names}, before)
    torch.testing.assert_close(net.state_dict(), state)
    assert net.plan == plan


class Fusing(nn.Module):
    """As RepVGG and YOLO have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)) if hasattr(self, "norm") else self.conv(x)

    def fuse(self) -> None:
        self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
        del self.norm


@pytest.mark.parametrize("use", ["train", "eval", "save", "copy", "run"])
def test_norms_that_are_fused(use: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = models.Around(Fusing())
    net, x = detachnet.make_detachable(model, ["a"], SIZE).eval(), torch.randn(4, *SIZE)
    before = net(x)
    net.base.mid.fuse()
    if use in ("train", "eval"):
        net.train(use == "train")
    net = copy.deepcopy(net) if use == "copy" else net
    if use == "save":
        detachnet.save(net, tmp_path / "fused")
    torch.testing.assert_close(net.eval()(x), before)
    assert "norms.sub0.mid.norm is gone: there is no such layer any more" in caplog.text or use == "copy"
    assert not [name for name, _ in net.norms.named_modules() if name.endswith("mid.norm")]
    torch.testing.assert_close(net.detach("sub0")(x), net(x, which="sub0"))
    if use == "save":
        model.mid.fuse()
        torch.testing.assert_close(detachnet.load(tmp_path / "fused", model=model)(x), before)


def test_sub_models_own_batch_norms_have_the_numbers_that_the_models_are_given() -> None:
    net, x = detachnet.make_detachable(models.Around(nn.BatchNorm2d(8)), ["a"], SIZE), torch.randn(4, *SIZE)
    own = net.norms.get_submodule("sub0.mid")
    for model, eps, momentum in ((net, 0.1, 0.5), (copy.deepcopy(net), 0.2, None)):
        model.base.mid.eps, model.base.mid.momentum = eps, momentum
        model(x, which="sub0")
        theirs = model.norms.get_submodule("sub0.mid")
        assert (theirs.eps, theirs.momentum) == (eps, momentum)
    assert (own.eps, own.momentum) == (0.1, 0.5)
    own.eps, net.base.mid.eps = 0.3, 0.4
    net(x, which="sub0")
    assert own.eps == 0.3, "one that was set otherwise was changed, too"


class Active(nn.BatchNorm2d):
    """A batch norm with a way, a rate and an activation of its own, as AdvProp's and timm's are."""

    def __init__(self, rates: Any) -> None:
        super().__init__(8)
        self.way, self.rates, self.act = "up", rates, nn.LeakyReLU(0.01)
        nn.init.constant_(self.bias, -0.5)  # so that the activation has something to do

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(super().forward(x)) * self.rates["x"]
        return x if self.way == "up" else -x


@pytest.mark.parametrize("sub", [{"behind": "a"}, {"narrow": SubModel(width=0.5)}])
@pytest.mark.parametrize(
    "change",
    [
        lambda norm: setattr(norm, "way", "down"),
        lambda norm: setattr(norm, "act", nn.LeakyReLU(0.9)),
        lambda norm: setattr(norm.act, "negative_slope", 0.9),
        lambda norm: norm.rates.update(x=3.0),
        lambda norm: setattr(norm, "rates", {"x": 3.0}),
        lambda norm: setattr(norm, "eps", 0.5),
    ],
)
def test_own_batch_norms_follow_whatever_their_class(change: Any, sub: Any) -> None:
    """Each sub-model is what it is in a family that is made of the changed model."""
    model, x = models.Around(nn.Sequential(Active({"x": 1.0}), nn.Conv2d(8, 8, 1))), torch.randn(4, *SIZE)
    net = detachnet.make_detachable(model, sub, SIZE).eval()
    before = net(x, which="all")
    change(net.base.mid[0])
    after = net(x, which="all")
    fresh = detachnet.make_detachable(copy.deepcopy(net.base), sub, SIZE).eval()
    fresh.load_state_dict(net.state_dict())
    for name, output in fresh(x, which="all").items():
        torch.testing.assert_close(after[name], output)
        assert not torch.allclose(after[name], before[name])


class Frozen(models.Around):
    """A norm that stays in evaluation mode, as detectors have them."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(8))

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.mid.eval()
        return self


@pytest.mark.parametrize("asked", [{"behind": "a"}, {"narrow": SubModel(width=0.5)}])
def test_a_norm_that_a_model_keeps_frozen_stays_so_detached(asked: Any) -> None:
    net, x = detachnet.make_detachable(Frozen(), asked, SIZE), torch.randn(4, *SIZE)
    name = net.names[1]
    detached = net.detach(name).train()
    assert not detached.get_submodule("mid").training
    assert detached.get_submodule("b").training
    torch.testing.assert_close(detached(x), net.train()(x, which=name))


def test_pairs_in_one_batch_are_refused_with_the_reason() -> None:
    class Siamese(models.Around):
        def forward(self, x: Tensor) -> Tensor:
            one, two = self.b(self.mid(self.a(x))).chunk(2)
            logits: Tensor = self.fc((one - two).relu().mean((2, 3)))
            return logits

    with pytest.raises(
        detachnet.TraceError, match=r"runs on 12 images but not on 11: it fails at 'sub'[\s\S]*outside of"
    ):
        detachnet.make_detachable(Siamese(nn.Identity()), ["a"], SIZE)


def test_inside_inference_mode() -> None:
    model = models.Around(nn.BatchNorm2d(8))
    with torch.inference_mode():
        net = detachnet.make_detachable(model, ["a"], SIZE)
        net.eval()(torch.randn(2, *SIZE), which="all")
        net.base.mid = nn.Sequential(net.base.mid, nn.ReLU())
        net(torch.randn(2, *SIZE), which="all")
    net.train()(torch.randn(2, *SIZE), which="sub0").sum().backward()
    with torch.inference_mode():
        made = models.Around(nn.Identity())
    with pytest.raises(detachnet.TraceError, match=r"made inside torch.inference_mode\(\)[\s\S]*outside of it"):
        detachnet.make_detachable(made, ["a"], SIZE)


class Counting(nn.Module):
    """Counts its passes, in a number and in a buffer, behind a norm; a gain is scheduled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.steps, self.gain = nn.BatchNorm2d(8), 0, 1.0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.steps += 1
        self.count = self.count + 1
        return self.norm(x) * self.steps * self.gain + self.count


def test_what_passes_count_is_each_models_own_and_what_a_loop_schedules_is_every_models() -> None:
    net, x = detachnet.make_detachable(models.Around(Counting()), ["a"], SIZE), torch.randn(4, *SIZE)
    assert net.plan.whole.keys() == {"mid"}
    separate = copy.deepcopy(net)
    for gain in (1.0, 1.0, 0.5):
        net.base.mid.gain = separate.base.mid.gain = gain
        together = net(x, which="all")
        for name, output in together.items():
            torch.testing.assert_close(separate(x, which=name), output)
    sub = net.norms.get_submodule("sub0.mid")
    assert (sub.steps, sub.count, sub.gain) == (net.base.mid.steps, net.base.mid.count, 0.5) == (3, 3, 0.5)


class OfParameters(nn.Module):
    """Keeps its mean as a parameter without gradients, and begins after a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            if self.passes > 1:
                with torch.no_grad():
                    self.mean.lerp_(x.mean((0, 2, 3)), 0.5)
        return x - self.mean[:, None, None]


def test_statistics_that_begin_later_or_are_parameters_are_each_models_own() -> None:
    net, x = detachnet.make_detachable(models.Around(OfParameters()), ["a"], SIZE).train(), torch.randn(4, *SIZE)
    alone = copy.deepcopy(net.base)
    for _ in range(4):
        net(x, which="all")
        alone(x)
    torch.testing.assert_close(net.base.mid.mean, alone.mid.mean)
    assert not torch.allclose(net.norms.get_submodule("sub0.mid").mean, alone.mid.mean)


class Caching(nn.Module):
    """Makes a table in its first pass, and keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.passes = nn.BatchNorm2d(8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if not hasattr(self, "table"):
            self.table = torch.full((8, 1, 1), float(self.passes))
        return self.norm(x) + self.table


def test_what_is_deleted_in_the_model_is_gone_in_its_copies() -> None:
    net, x = detachnet.make_detachable(models.Around(Caching()), ["a"], SIZE), torch.randn(4, *SIZE)
    assert net.plan.whole.keys() == {"mid"}
    for _ in range(2):
        net.base(x)
        net(x, which="all")
    sub = net.norms.get_submodule("sub0.mid")
    del net.base.mid.table
    net(x, which="sub0")
    assert "table" not in vars(net.base.mid)
    assert "table" in vars(sub)
    torch.testing.assert_close(sub.table, torch.full((8, 1, 1), float(sub.passes)))
