"""A family is its model, or it says it is not: what a trace loses is found when the family is made."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import detachnet
from detachnet.surgery import passes, proof
from detachnet.surgery.choice import _Chain
from detachnet.surgery.plan import DetachPlan
from detachnet.surgery.trace import trace
from tests import models
from tests.helpers import assert_joint_equals_separate

pytestmark = pytest.mark.slow


class Stem(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())


class Net(nn.Module):
    """Four layers around a part that a trace may lose."""

    def __init__(self, middle: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = Stem(), nn.Conv2d(8, 8, 3, 1, 1)
        self.c, self.fc = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.c(self.middle(self.b(self.a(x)))).mean((2, 3)))
        return logits


class Lossy(nn.Module):
    """A module with a child, so that it is traced."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.run = nn.Conv2d(8, 8, 3, 1, 1), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def by_device(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.conv(x * 10 if x.device.type == "cpu" else x)
    return out


def by_meta(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.conv(x) - (1 if x.is_meta else 0)
    return out


def by_gradient(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.conv(x * 10 if x.requires_grad else x)
    return out


def by_chance(module: Any, x: Tensor) -> Tensor:
    for _ in range(20):
        x = module.conv(x) if module.training and random.random() < 0.5 else x + 1
    return x


def by_numpy(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.conv(x) * float(np.random.rand())
    return out


def without_gradient(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module.conv(x)
    return out


def in_inference_of_data(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = module.conv.weight * 1
    return F.conv2d(x, weight, module.conv.bias, padding=1)


def in_half_precision(module: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out: Tensor = module.conv(x)
    return out.to(x.dtype)


def reversed_gradient(module: Any, x: Tensor) -> Tensor:
    out: Tensor = models.Reverse.apply(module.conv(x))  # type: ignore[no-untyped-call]
    return out


def slice_in_place(module: Any, x: Tensor) -> Tensor:
    x = module.conv(x)
    part = x[:, :4]
    part += 1.0
    return x


LOST: dict[Callable[[nn.Module, Tensor], Tensor], str] = {
    by_device: "evaluation mode its values are others",
    by_meta: "evaluation mode its values are others",
    by_gradient: "training mode its values are others",
    by_chance: "training mode its values are others",
    by_numpy: "evaluation mode its values are others",
    without_gradient: "the gradient of",
    in_inference_of_data: "the gradient of",
    in_half_precision: "evaluation mode its values are others",
    reversed_gradient: "the gradient of",
    slice_in_place: "evaluation mode its values are others",
}
"""What a trace may lose, and how the refusal says it if it does."""


@pytest.mark.parametrize("run", LOST, ids=lambda run: run.__name__)
def test_the_family_is_the_model_or_is_refused(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """The way out that the refusal names works."""
    model = Net(Lossy(run))
    net, error = made_or_refused(model)
    if error and error.summary.startswith("the traced"):
        assert LOST[run] in error.summary
        assert error.node in ("middle", "b", None)
    if error:
        assert len(str(error).splitlines()) <= 5
        assert "leaf_modules" in str(error)
    assert_same_step(model, net or detachnet.make_detachable(model, ["a"], (3, 16, 16), leaf_modules=[Lossy]))


def made_or_refused(model: nn.Module) -> tuple[detachnet.DetachableNet | None, detachnet.TraceError | None]:
    """The family, where what a trace loses is kept; else the refusal."""
    try:
        return detachnet.make_detachable(model, ["a"], (3, 16, 16)), None
    except detachnet.TraceError as error:
        return None, error


def assert_same_step(model: nn.Module, net: detachnet.DetachableNet) -> None:
    """A training step of the model and of the base-model, with one seed."""
    images = torch.randn(4, 3, 16, 16)
    alone, family = copy.deepcopy(model).train(), copy.deepcopy(net).train()
    for run in (alone, family):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        run(images).square().sum().backward()
    for (name, one), (_, two) in zip(alone.named_parameters(), family.base.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None and two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_the_refusal_names_the_module_and_the_way_out() -> None:
    model = Net(nn.Sequential(nn.ReLU(), Lossy(by_device)))
    net, error = made_or_refused(model)
    if error:
        assert error.node == "middle.1"
        assert "leaf_modules=[Lossy] keeps 'middle.1' whole" in str(error)
    if net:
        assert_same_step(model, net)


def test_what_is_compared_can_be_chosen() -> None:
    with pytest.raises(detachnet.TraceError, match="check is 'full', 'outputs' or 'none', not 'all'"):
        detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), check="all")  # type: ignore[arg-type]
    said = {
        "full": "",
        "outputs": "no gradients were compared with the model's",
        "none": "nothing was compared with the model",
    }
    for check, checked in said.items():
        plan = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), check=check).plan  # type: ignore[arg-type]
        assert plan.checked == checked
        assert ("checked:" in str(plan)) == bool(checked)
        assert DetachPlan.model_validate_json(plan.model_dump_json()) == plan
    before = plan.model_dump(exclude={"checked"})
    assert DetachPlan.model_validate(before).checked == ""


def test_without_weights_the_plan_says_that_nothing_was_compared() -> None:
    net = detachnet.make_detachable(models.Plain().to("meta"), ["pool"], (3, 8, 8))
    assert net.plan.checked == "nothing was compared with the model, which has no weights yet"


def test_a_model_that_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: nn.Module, *_: object) -> None:
        raise NotImplementedError("no kernel for this device")

    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), check="none")
    monkeypatch.setattr(models.Plain, "forward", fails)
    said = proof.prove(net, "full").checked
    assert said.endswith("model, which does not run here: NotImplementedError: no kernel for this device")


class InPlace(models.Around):
    """It has no gradients: a value that they need is overwritten, in training mode alone."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).sigmoid()
        return self.fc(self.b(x.mul_(2) if self.training else x * 2).mean((2, 3)))


class Once(models.Around):
    """It keeps a value of its first pass, and refuses a second one."""

    last: Tensor | None = None

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        if self.last is not None:
            raise RuntimeError("once only")
        self.last = x
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (InPlace(), "only evaluation mode was compared with the model, which does not run in training mode"),
        (Once(), "no later pass was compared with the model's, which does not run a second time"),
    ],
)
def test_of_a_model_that_runs_in_part_what_was_not_compared_is_said(model: nn.Module, said: str) -> None:
    assert said in detachnet.make_detachable(model, ["a"], (3, 16, 16)).plan.checked


def test_the_plan_says_what_joins_the_images_of_a_batch() -> None:
    mixed = detachnet.make_detachable(Net(lambda x: x.flip(0)), ["a"], (3, 16, 16)).plan
    assert mixed.checked == "'flip' joins the images of a batch and runs model by model"
    apart = detachnet.make_detachable(Net(lambda x: x - x.mean()), ["a"], (3, 16, 16)).plan
    assert "'mean' gives a value that all images of a batch go into: the models run one after another" in str(
        apart
    )


def test_the_model_the_random_states_and_the_mode_come_back() -> None:
    model = Net(nn.Dropout(0.5)).eval()
    model.b.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    python, numpy, torchs = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    net = detachnet.make_detachable(model, ["a"], (3, 16, 16))
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torchs)
    for one in (model, net.base):
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
        assert [module.training for module in one.modules()] == modes
        assert all(parameter.grad is None for parameter in one.parameters())


class OneAtATime(nn.Module):
    """Counts its calls in an attribute, so that two models in one pass are not two passes."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x
        self.calls += 1
        return x * self.calls


def test_joint_passes_that_are_not_separate_ones_are_refused() -> None:
    cuts = {"sub0": detachnet.SubModel(drop=["middle:c"])}  # both run the middle, as one network
    with pytest.raises(
        detachnet.TraceError,
        match=r"the models of Net cannot share one pass: in evaluation mode they give other results than alone"
        r"[\s\S]*outputs differ by[\s\S]*run the models one at a time",
    ):
        detachnet.make_detachable(Net(OneAtATime()), cuts, (3, 16, 16))


def test_weights_that_a_pass_changes_at_random_are_refused() -> None:
    def changed(module: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            module.conv.weight.mul_(0.9)
        out: Tensor = module.conv(x) + torch.rand_like(x)
        return out

    with pytest.raises(detachnet.TraceError, match=r"changes the weight 'middle\.conv\.weight'"):
        detachnet.make_detachable(Net(Lossy(changed)), ["a"], (3, 16, 16))


def test_what_counts_its_calls_counts_on_from_model_to_model() -> None:
    net = detachnet.make_detachable(Net(OneAtATime()), ["a"], (3, 16, 16)).eval()
    images = torch.randn(2, 3, 16, 16)
    joint = net(images, which="all")
    net.base.middle.calls = 0  # type: ignore[union-attr]
    for name in net.names:
        torch.testing.assert_close(net(images, which=name), joint[name])


def test_joint_passes_that_fail_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Tensor:
        raise RuntimeError("a view is modified in place")

    monkeypatch.setattr(torch, "cat", fails)
    with pytest.raises(
        detachnet.TraceError, match=r"share one pass: it fails in evaluation mode[\s\S]*RuntimeError: a view"
    ):
        detachnet.make_detachable(models.Skip(), ["stem"], (3, 8, 8))


def test_hooks_that_no_graph_runs_are_named_or_run() -> None:
    model = Net(nn.Identity())
    model.a.register_forward_hook(lambda *args: args[2] * 10)
    net = detachnet.make_detachable(model, ["b"], (3, 16, 16)).eval()
    images = torch.randn(2, 3, 16, 16)
    if not torch.allclose(net(images), model.eval()(images)):
        assert net.plan.hints == ("the family does not run the hooks of 'a'",)


def mix_style(x: Tensor) -> Tensor:
    """Mixes the images' means; draws a permutation before the shares, which are needed first."""
    mean = x.mean((2, 3), keepdim=True)
    order = torch.randperm(x.shape[0])
    share = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)
    return x - mean + share * mean + (1 - share) * mean[order]


def test_random_numbers_in_another_order_are_no_difference() -> None:
    plan = detachnet.make_detachable(Net(mix_style), ["a"], (3, 16, 16)).plan
    assert "in training mode it draws its random numbers in another order" in plan.checked
    assert "joins the images of a batch and runs model by model" in plan.checked


# Layers that keep statistics.


class OwnNorm(nn.Module):
    """A batch norm that is none of torch's."""

    def __init__(self, num_chs: int = 8) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_chs)), nn.Parameter(torch.zeros(num_chs))
        self.register_buffer("mean", torch.zeros(num_chs))
        self.register_buffer("variance", torch.ones(num_chs))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, self.training)


class Centered(nn.Module):
    """Follows the mean of what it sees, without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.center.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3))[:, None, None])
        return x - self.center


class Wrapped(nn.Module):
    """An own norm and a convolution, kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = OwnNorm(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm(x))
        return out


class Opened(OwnNorm):
    """An own norm with a child: it is traced, so its buffers cannot be private."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


NORMS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "own": (OwnNorm, {"weight", "bias", "mean", "variance"}),
    "centered": (Centered, {"center"}),
    "instance": (
        lambda: nn.InstanceNorm2d(8, track_running_stats=True),
        {"running_mean", "running_var", "num_batches_tracked"},
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_layers_that_keep_statistics_are_private_whatever_their_class(name: str) -> None:
    make, parts = NORMS[name]
    net = detachnet.make_detachable(Net(make()).double(), ["a"], (3, 16, 16))
    assert net.plan.hints == ()
    assert {key for key in net.state_dict() if key.startswith("norms.")} == {
        f"norms.sub0.middle.{part}" for part in parts
    }
    assert_joint_equals_separate(net, torch.randn(4, 3, 16, 16, dtype=torch.double))
    again = copy.deepcopy(net)
    images = torch.randn(4, 3, 16, 16, dtype=torch.double)
    assert torch.equal(again.eval()(images, which="sub0"), net.eval()(images, which="sub0"))


def test_of_a_layer_kept_whole_only_the_norm_is_private() -> None:
    net = detachnet.make_detachable(Net(Wrapped()).double(), ["a"], (3, 16, 16), leaf_modules=[Wrapped])
    own = net.norms.get_submodule("sub0.middle")
    assert own.conv.weight is net.base.middle.conv.weight  # type: ignore[union-attr]
    assert own.norm.weight is not net.base.middle.norm.weight  # type: ignore[union-attr]
    assert_joint_equals_separate(net, torch.randn(4, 3, 16, 16, dtype=torch.double))


def test_statistics_that_cannot_be_private_are_named_in_a_hint() -> None:
    net = detachnet.make_detachable(Net(Opened()).double(), ["a"], (3, 16, 16))
    if not list(net.norms.buffers()):
        hint = "all models share 'middle.mean', 'middle.variance', which training changes"
        assert net.plan.hints == (hint,)
    assert detachnet.make_detachable(Net(Opened()), ["a"], (3, 16, 16), norm="shared").plan.hints == ()


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.spectral_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        pytest.param(torch.nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm")),
        torch.nn.utils.parametrizations.weight_norm,
    ],
    ids=["spectral", "spectral anew", "weight", "weight anew"],
)
def test_layers_that_compute_their_weights_run_as_alone(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = detachnet.make_detachable(Net(wrap(nn.Conv2d(8, 8, 3, 1, 1))).double(), ["a"], (3, 16, 16))
    assert_joint_equals_separate(net, torch.randn(4, 3, 16, 16, dtype=torch.double))


# Preparation of the image, and weight averages.


class Prepared(nn.Module):
    def __init__(self, prepare: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.net, self.prepare = models.Plain(), prepare

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.prepare(x))
        return logits


class Colours(nn.Conv2d):
    """A normalization as a convolution that is not trained."""

    def __init__(self) -> None:
        super().__init__(3, 3, 1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(3)[:, :, None, None] / 58)
            self.bias.fill_(-2)  # type: ignore[union-attr]
        self.requires_grad_(False)


class Learned(nn.Module):
    """A mean image and a scale, as weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = (
            nn.Parameter(torch.full((3, 8, 8), 118.0)),
            nn.Parameter(torch.ones(1, 3, 1, 1) / 58),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 118.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / 58


def flipped(x: Tensor) -> Tensor:
    return torch.where(torch.rand(x.shape[0], 1, 1, 1) < 0.5, x.flip(-1), x)


PREPARING: list[Any] = [
    (lambda x: (x - 118.0) / 58.0, "'sub', 'truediv'", "truediv"),
    (Normalize(), "'prepare'", "prepare"),
    (nn.BatchNorm2d(3, affine=False), "'prepare'", "prepare"),
    (lambda x: F.interpolate(x, size=(8, 8)) * 2, "'interpolate', 'mul'", "mul"),
    (nn.Sequential(Normalize(), nn.Identity()), "'prepare.0'", "prepare.0"),
    (nn.BatchNorm2d(3), "'prepare'", "prepare"),
    (nn.LayerNorm([3, 8, 8]), "'prepare'", "prepare"),
    (nn.Sequential(Colours(), Learned()), "'prepare.0', 'prepare'", "prepare"),
]


@pytest.mark.parametrize(("prepare", "named", "end"), PREPARING)
def test_what_prepares_the_image_prepares_it_for_all_models(prepare: Any, named: str, end: str) -> None:
    model = Prepared(prepare)
    net = detachnet.make_detachable(model, ["net.pool"], (3, 8, 8))
    assert net.plan.hints[0] == f"{named} in front of 'net.conv1': all models get the image so prepared"
    sub = net.plan["sub0"]
    assert (str(sub.spans[0]), sub.cut, sub.is_cut) == (f"{end}:net.pool", "net.pool", True)
    inner = detachnet.make_detachable(model.net, ["pool"], (3, 8, 8))
    images = torch.randn(4, 3, 8, 8) * 58 + 118
    prepared, seen = prepare.eval()(images) if isinstance(prepare, nn.Module) else prepare(images), []
    net.bridges.get_submodule("sub0.0").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.eval()(images, which="all")
    torch.testing.assert_close(seen[0], prepared)
    assert inner.plan["sub0"].stepdown == sub.stepdown
    again = detachnet.make_detachable(Prepared(prepare).double(), ["net.pool"], (3, 8, 8))
    assert_joint_equals_separate(again, images.double())


def test_a_sub_model_takes_in_the_raw_image_where_it_is_asked_to(tmp_path: Path) -> None:
    cuts = {"a": "net.pool", "b": detachnet.SubModel(drop=[":net.pool"])}
    net = detachnet.make_detachable(Prepared(Normalize()), cuts, (3, 8, 8)).eval()
    assert net.plan.hints[:2] == (
        "'prepare' in front of 'net.conv1': all models get the image so prepared",
        "sub-models get the raw image, without 'prepare' in front of 'net.conv1'",
    )
    assert [str(model.spans[0]) for model in net.plan.models[1:]] == ["prepare:net.pool", ":net.pool"]
    detachnet.save(net, tmp_path / "family.safetensors")
    again = detachnet.load(tmp_path / "family.safetensors", Prepared(Normalize())).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again(images, which="all"), net(images, which="all"))
    torch.testing.assert_close(net.detach("a")(images), net(images, which="a"))
    assert _Chain(trace(Prepared(Normalize()), (3, 8, 8)), "conv", None, None).names[0] == "prepare"


def test_what_prepares_the_image_in_training_only_is_named() -> None:
    class Augmented(Prepared):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(flipped(x) if self.training else x)

    plan = detachnet.make_detachable(Augmented(nn.Identity()), ["net.pool"], (3, 8, 8)).plan
    assert plan.hints[0].startswith("in training mode sub-models do without")
    assert "'where' in front of 'net.conv1'" in plan.hints[0]
    assert [str(span) for span in plan["sub0"].spans] == [":net.pool"]


def test_bytes_are_taken_in_behind_what_makes_numbers_of_them() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for prepare in (lambda x: x.float() / 255, lambda x: x.float()):
        model = Prepared(prepare)
        net = detachnet.make_detachable(model, ["net.pool"], example_input=images).eval()
        torch.testing.assert_close(net(images, which="all")["base"], model.eval()(images))
        begin = net.plan["sub0"].spans[0].start
        raw = {"a": detachnet.SubModel(drop=[":net.pool"])}
        with pytest.raises(
            detachnet.StepDownError, match=rf"takes in images of torch\.uint8[\s\S]*drop=\['{begin}:net\.pool'\]"
        ):
            detachnet.make_detachable(model, raw, example_input=images)


@pytest.mark.parametrize(
    "prepare",
    [nn.Identity(), nn.Dropout(0.1), lambda x: x.contiguous().clone(), nn.Conv2d(3, 3, 3, 1, 1), nn.Linear(8, 8)],
)
def test_what_leaves_the_image_as_it_is_or_sees_more_of_it_is_not_named(prepare: Any) -> None:
    assert detachnet.make_detachable(Prepared(prepare), ["net.pool"], (3, 8, 8)).plan.hints == ()


@pytest.mark.parametrize(
    "average",
    [AveragedModel, lambda net: AveragedModel(net, use_buffers=True), lambda net: net],
    ids=["averaged", "with buffers", "itself"],
)
def test_averaged_weights_get_their_statistics_by_recalibration(average: Callable[[nn.Module], nn.Module]) -> None:
    """`update_bn` runs the active model alone and leaves the norms of the others empty."""
    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8)).train()
    batches = [torch.randn(8, 3, 8, 8) + 1 for _ in range(4)]
    averaged = average(net)
    update_bn(batches, averaged)
    family = averaged.module if isinstance(averaged, AveragedModel) else averaged
    again, before = detachnet.recalibrate(family, batches), family.state_dict()
    assert not before["norms.sub0.bn2.running_mean"].any()
    assert again.state_dict()["norms.sub0.bn2.running_mean"].any()
    torch.testing.assert_close(again.state_dict()["base.bn2.running_mean"], before["base.bn2.running_mean"])


# What the comparison costs.


class Averaged(torch.autograd.Function):
    """The gradient of a mean over the images, whatever their number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / len(gradient)


def averaged(module: Any, x: Tensor) -> Tensor:
    out: Tensor = Averaged.apply(module.conv(x))  # type: ignore[no-untyped-call]
    return out


@pytest.mark.parametrize("is_large", [False, True])
def test_gradients_that_joint_passes_mix_are_refused(is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Averaged, "__module__", "torchvision.ops")  # of the user's own they run model by model
    if is_large:
        monkeypatch.setattr(passes, "EXACT_MACS", 0)
    with pytest.raises(
        detachnet.TraceError, match=r"in training mode they give other results[\s\S]*the gradient of"
    ):
        detachnet.make_detachable(Net(Lossy(averaged)), ["a"], (3, 16, 16))


class Squeezed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


def test_a_large_model_that_drops_the_axis_of_one_image_is_compared_on_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "EXACT_MACS", 0)
    monkeypatch.setattr(proof, "JOINT_MACS", 0)
    said = "joint passes were compared in evaluation mode only, for the size of the model"
    fails = Net(lambda x: x.squeeze())  # on one image
    spread = Net(lambda x: x / (1 + x.std(0)))  # of one image there is none
    for model in (fails, Squeezed(nn.Identity())):
        assert detachnet.make_detachable(model, ["a"], (3, 16, 16)).plan.checked == said
    assert said in detachnet.make_detachable(spread, ["a"], (3, 16, 16)).plan.checked
    with pytest.raises(detachnet.TraceError, match="in evaluation mode they give other results"):
        detachnet.make_detachable(Net(OneAtATime()), {"sub0": detachnet.SubModel(drop=["middle:c"])}, (3, 16, 16))


def test_large_models_are_compared_in_ten_passes_of_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five in each mode: the model, its base view, all models at once, and the other two alone."""
    monkeypatch.setattr(passes, "EXACT_MACS", 0)
    seen: list[tuple[bool, int]] = []
    run = nn.Linear.forward

    def counted(layer: nn.Linear, x: Tensor) -> Tensor:
        if not x.is_meta:
            seen.append((torch.is_grad_enabled(), len(x)))
        return run(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    net = detachnet.make_detachable(Net(torch.relu), ["a", "b"], (3, 16, 16))
    assert seen == [(False, n) for n in (1, 1, 3, 1, 1)] + [(True, n) for n in (2, 2, 6, 2, 2)]
    skipped = {"base.b.weight", "base.c.weight", "base.fc.weight"}
    assert proof._telling(net) == {name for name, _ in net.named_parameters()} - skipped


class GradientStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return x - torch.autograd.grad(self.conv(x).square().sum(), x)[0]


class HooksItsValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(x)
        h.register_hook(torch.neg)
        return h


class Settings(dict[str, float]):
    def __getattr__(self, name: str) -> float:
        return self[name]


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))  # type: ignore[no-any-return]


def with_settings() -> nn.Module:
    layer = nn.Conv2d(8, 8, 1)
    layer.settings = Settings(gain=2.0)  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (GradientStep, r"fails at 'mid'[\s\S]*try .*without gradients, and take none"),
        (HooksItsValue, r"fails at 'mid'[\s\S]*requires? grad[\s\S]*try .*without gradients"),
        (with_settings, r"cannot copy Around: its 'mid.settings' \(Settings\) allows no copy"),
        (scripted, r"'mid' is a script module with statistics[\s\S]*try .*before torch.jit.script"),
    ],
    ids=["gradients", "hooks", "settings", "scripted"],
)
def test_refused_with_the_true_reason(middle: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(detachnet.TraceError, match=message):
        detachnet.make_detachable(models.Around(middle()), ["a"], (3, 16, 16))


@pytest.mark.parametrize("norm", ["shared", "private"])
def test_script_modules_without_statistics(norm: Any) -> None:
    middle = scripted() if norm == "shared" else torch.jit.script(nn.Conv2d(8, 8, 1))
    model, images = models.Around(middle), torch.randn(4, 3, 16, 16)
    net = detachnet.make_detachable(model, ["a"], (3, 16, 16), norm=norm)
    torch.testing.assert_close(net.eval()(images, which="base"), model.eval()(images))


def summed(x: Tensor) -> Tensor:
    """Into a tensor that each pass makes anew."""
    level = torch.zeros((), dtype=x.dtype)
    for i in range(3):
        level += x[:, i].mean()
    return x + level


def filled(x: Tensor) -> Tensor:
    level = torch.zeros(8, 1, 1, dtype=x.dtype)
    level.add_(x.mean())
    return x * (1 + level)


@pytest.mark.parametrize("middle", [summed, filled])
def test_each_pass_writes_into_a_tensor_of_its_own(middle: Callable[[Tensor], Tensor]) -> None:
    model = Net(middle).double()
    net, x = detachnet.make_detachable(model, ["a"], (3, 16, 16)), torch.randn(4, 3, 16, 16, dtype=torch.double)
    assert net.plan.hints == ()
    for _ in range(2):
        net(x).sum().backward()
    net.eval(), model.eval()
    model.load_state_dict(net.base.state_dict())
    for _ in range(2):
        torch.testing.assert_close(net(x), model(x))


LEVEL = torch.zeros(8, 1, 1, dtype=torch.double)


def into_another(x: Tensor) -> Tensor:
    LEVEL.add_(x.detach().mean())
    return x * (1 + LEVEL)


def test_a_tensor_that_stays_is_no_pass_s_own() -> None:
    with pytest.raises(detachnet.TraceError, match="has a tensor of its own changed in place"):
        detachnet.make_detachable(Net(into_another).double(), ["a"], (3, 16, 16))


class Averaging(nn.Module):
    """Keeps statistics where torch does not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.zeros(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.detach().mean((0, 2, 3)).view(8, 1, 1).to(self.level)
        return x - self.level.to(x)


def test_statistics_outside_of_buffers_are_named_in_a_hint() -> None:
    net = detachnet.make_detachable(Net(Averaging()), ["a"], (3, 16, 16))
    assert net.plan.hints == ("all models share 'middle.level', which training changes",)
    assert detachnet.make_detachable(Net(Averaging()), ["a"], (3, 16, 16), norm="shared").plan.hints == ()


def tried(x: Tensor) -> Tensor:
    try:
        return x.view(x.shape[0], 7, -1)
    except RuntimeError:
        return x * 2


def test_what_runs_with_values_only_is_refused_for_that() -> None:
    with pytest.raises(detachnet.TraceError, match="Net: it runs, but not without values: it fails at 'view'"):
        detachnet.make_detachable(Net(tried), ["a"], (3, 16, 16))


def test_checkpointing_with_norms_is_refused_for_that() -> None:
    model = detachnet.create_model("timm:resnet18", num_classes=5)
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    with pytest.raises(detachnet.TraceError, match="checkpointing runs what it leaves out once more"):
        detachnet.make_detachable(model, [0.5], (3, 32, 32))


def test_a_layer_that_is_no_part_is_refused_for_that() -> None:
    layer = nn.Conv2d(8, 8, 1)
    with pytest.raises(detachnet.TraceError, match=r"a layer or a weight that is no part of it[\s\S]*ModuleList"):
        detachnet.make_detachable(Net(lambda x: layer(x)), ["a"], (3, 16, 16))


class ByName(Net):
    """A weight that is asked for by its name."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x) * self.get_parameter("b.weight").abs().sum()
        return logits


def test_a_weight_by_its_name() -> None:
    net = detachnet.make_detachable(ByName(nn.Identity()).double(), ["a"], (3, 16, 16))
    x = torch.randn(4, 3, 16, 16, dtype=torch.double)
    torch.testing.assert_close(net.eval()(x), net.base(x))
    with torch.no_grad():
        net.base.b.weight.mul_(2)  # type: ignore[operator]
    torch.testing.assert_close(net(x), net.base(x))


class Late(nn.Module):
    """Makes its weight when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.w: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.w is None:
            self.w = nn.Parameter(torch.ones(8, 1, 1, dtype=x.dtype, device=x.device))
        return x * self.w


def test_a_weight_that_the_first_pass_makes() -> None:
    assert "does not run here" not in detachnet.make_detachable(Net(Late()), ["a"], (3, 16, 16)).plan.checked


def test_a_difference_beside_script_modules_is_refused_with_its_reason() -> None:
    class Doubling(models.Around):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x)
            return 2 * out if type(out) is Tensor else out

    middle = torch.jit.script(nn.Conv2d(8, 8, 1))
    with pytest.raises(detachnet.TraceError, match="the traced Doubling is not the model: in evaluation mode"):
        detachnet.make_detachable(Doubling(middle), ["a"], (3, 16, 16))


class Unused(nn.Module):
    """Runs a branch whose output it does not take, and may read what that has learnt of its images."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.stem, self.branch, self.reads = Stem(), nn.BatchNorm2d(8), reads
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.branch(x)
        return self.head(x - self.branch.running_mean.view(1, -1, 1, 1) if self.reads else x)


def test_a_branch_whose_output_is_not_used() -> None:
    net = detachnet.make_detachable(Unused(), ["stem"], (3, 8, 8))
    assert (
        "the output of 'branch' is not used: the family does not run it, and its statistics stay" in net.plan.hints
    )
    with pytest.raises(detachnet.TraceError, match="not the model"):
        detachnet.make_detachable(Unused(reads=True), ["stem"], (3, 8, 8))


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.norm(x).unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1)
        return parts.reshape(int(parts.shape[0] / 2), *x.shape[1:])


def test_a_number_that_follows_the_batch_by_a_fraction() -> None:
    model = nn.Sequential(Stem(), Windows(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(
        detachnet.TraceError, match=r"a // b in the place of int\(a / b\)[\s\S]*leaf_modules=\[Windows\]"
    ):
        detachnet.make_detachable(model, ["0"], (3, 8, 8))
    net = detachnet.make_detachable(model, ["0"], (3, 8, 8), leaf_modules=[Windows])
    assert net.plan.checked == ""


class Listens(nn.Module):
    """Reads what hooks of its layers have kept."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.kept = nn.Sequential(Stem(), nn.Conv2d(8, 8, 3)), nn.Linear(8, 5), {}
        self.body[0].register_forward_hook(lambda module, args, out: self.kept.update(stem=out))

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        kept: Tensor = self.kept["stem"]
        return self.head(kept.mean((2, 3)))


def test_what_hooks_keep_for_the_forward_pass_is_refused_for_that() -> None:
    with pytest.raises(detachnet.TraceError, match=r"a trace runs no hooks: take what those of 'body\.0' keep"):
        detachnet.make_detachable(Listens(), ["body.0"], (3, 8, 8))
