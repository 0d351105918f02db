import copy
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import detachnet
from detachnet import SubModel
from detachnet.checkpoint.answer import answer
from tests import models


@pytest.fixture
def net() -> detachnet.DetachableNet:
    return detachnet.make_detachable(models.Plain(), ["conv1", "pool"], (3, 8, 8)).eval()


IMAGES = torch.randn(4, 3, 8, 8)


def test_without_cuts_it_is_the_model_bit_for_bit() -> None:
    model = models.Plain().eval()
    net = detachnet.make_detachable(model, [], (3, 8, 8))
    assert net.names == ("base",)
    assert torch.equal(net(IMAGES), model(IMAGES))


def test_base_has_the_models_own_keys(net: detachnet.DetachableNet) -> None:
    model = models.Plain()
    assert net.base.state_dict().keys() == model.state_dict().keys()
    net.base.load_state_dict(model.state_dict())
    assert torch.equal(net(IMAGES), model.eval()(IMAGES))


@pytest.mark.slow
def test_which_and_active(net: detachnet.DetachableNet) -> None:
    every = net(IMAGES, which="all")
    assert list(every) == ["base", "sub0", "sub1"]
    assert torch.equal(net(IMAGES), net(IMAGES, which="base"))
    net.active = "sub1"
    assert torch.equal(net(IMAGES), net(IMAGES, which="sub1"))
    assert not torch.equal(net(IMAGES), net(IMAGES, which="base"))


def test_unknown_model(net: detachnet.DetachableNet) -> None:
    for use in (
        lambda: net(IMAGES, which="sub2"),
        lambda: setattr(net, "active", "sub2"),
        lambda: net.detach("sub2"),
    ):
        with pytest.raises(detachnet.CutError, match=r"no model is called 'sub2'[\s\S]*base, sub0, sub1"):
            use()
    with pytest.raises(detachnet.CutError, match="name each model once and in order"):
        net(IMAGES, which=["sub1", "base"])


def test_unknown_norm() -> None:
    with pytest.raises(detachnet.CutError, match="norm is 'private' or 'shared', not 'own'"):
        detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), norm="own")


@pytest.mark.parametrize("share", [False, True])
def test_detached_equals_attached(net: detachnet.DetachableNet, share: bool) -> None:
    for name in net.names:
        detached = net.detach(name, share=share)
        assert not detached.training
        assert torch.equal(detached(IMAGES), net(IMAGES, which=name))


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Recurrent(nn.Module):
    """A block before and behind what may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.last, self.fc = block(3, 8, 2), block(8, 8), block(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.last(self.block(self.stem(x)))).mean((2, 3)))


class Apart(nn.Module):
    """The same, where a layer of a block is called by itself besides the block, which is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.last, self.fc = block(3, 8, 2), block(8, 8), block(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.block[1](self.stem(x)))
        return self.fc(self.block(x).mean((2, 3)))


class Behind(Apart):
    """The same, the layer behind the block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.block(self.stem(x)))
        return self.fc(self.block[1](x).mean((2, 3)))


class Named(nn.Module):
    """Layers with the names that a sub-model's own get."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.mid, self.bridge0 = block(3, 8, 2), block(8, channels), nn.Conv2d(channels, 8, 1)
        self.stepdown, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stepdown(self.bridge0(self.mid(self.stem(x)))).mean((2, 3)))


class Gains(nn.Module):
    """Parameters of which a narrower model reads parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.fc = block(3, 16, 2), block(16, 16), nn.Linear(16, 4)
        self.g, self.g_, self.g_part = (nn.Parameter(torch.rand(16, 1, 1)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.stem(x) * self.g * self.g_ + self.g_part).mean((2, 3)))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("model", "sub", "options"),
    [
        (Recurrent(), SubModel(drop=["block:last"]), {}),
        (Apart(), SubModel(drop=["stem:last"]), {"leaf_modules": ["block"]}),
        (Apart(), SubModel(drop=["block.1:last"]), {"leaf_modules": ["block"]}),
        (Behind(), SubModel(drop=["block:last"]), {"leaf_modules": ["block"]}),
        (Named(16), SubModel(drop=["stem:mid"]), {}),
        (Named(8), SubModel(drop=["stem:mid"]), {}),
        (Named(8), SubModel(drop=[":stem"]), {}),
        (Gains(), SubModel(width=0.5), {}),
    ],
)
def test_each_part_has_a_name_of_its_own_alone(
    model: nn.Module, sub: SubModel, options: dict[str, Any], share: bool
) -> None:
    net = detachnet.make_detachable(model, {"sub": sub}, (3, 16, 16), **options).double().train()
    images = torch.randn(8, 3, 16, 16).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):  # norms of its own are others than the base-model's from then on
        sum(out.square().mean() for out in net(images, which="all").values()).backward()
        optimizer.step()
    net.eval()
    expected, alone = net(images, which="sub"), net.detach("sub", share=share)
    assert torch.equal(alone(images), expected)
    if not share:  # what is shared with a family cannot be written without it
        assert torch.equal(pickle.loads(pickle.dumps(alone))(images), expected)


def test_detached_names_and_ownership(net: detachnet.DetachableNet) -> None:
    copied, shared = net.detach("sub1"), net.detach("sub1", share=True)
    assert set(dict(shared.named_parameters())) == {
        "stepdown.weight",
        "stepdown.bias",
        *(f"{layer}.{kind}" for layer in ("conv2", "bn2", "fc") for kind in ("weight", "bias")),
    }
    assert shared.get_parameter("conv2.weight") is net.base.get_parameter("conv2.weight")
    assert copied.get_parameter("conv2.weight") is not net.base.get_parameter("conv2.weight")
    assert type(net.detach("base")) is models.Plain


class HasStepdown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.stepdown = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.stepdown(self.conv(x)).mean((2, 3))


def test_a_model_with_a_stepdown_of_its_own() -> None:
    net = detachnet.make_detachable(HasStepdown(), ["conv"], (3, 8, 8)).eval()
    detached = net.detach("sub0")
    assert torch.equal(detached(IMAGES), net(IMAGES, which="sub0"))
    assert {name for name, _ in detached.named_children()} == {"stepdown", "stepdown_"}


class Keyed(nn.Module):
    """Layers and a parameter by names that are words of Python, or no names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = block(3, 16, 2), nn.Linear(16, 4)
        self.ops = nn.ModuleDict({key: block(16, 16) for key in ("class", "None", '"in\\', "3x3", "é", "<0>")})
        self.register_parameter("lambda", nn.Parameter(torch.rand(16, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * getattr(self, "lambda")
        for op in self.ops.values():
            x = op(x)
        return self.fc(x.mean((2, 3)))


def test_layers_may_have_any_name() -> None:
    model, x = Keyed().eval(), torch.randn(2, 3, 16, 16)
    subs = {"front": "ops.class", "inner": SubModel(drop=["ops.None:ops.3x3"]), "narrow": SubModel(width=0.5)}
    net = detachnet.make_detachable(model, subs, (3, 16, 16)).eval()
    assert torch.equal(net(x), model(x))
    for name in net.names:
        detached = net.detach(name)
        torch.testing.assert_close(detached(x), net(x, which=name))
        torch.testing.assert_close(pickle.loads(pickle.dumps(detached))(x), detached(x))


class Silent(models.Around):
    """What sets its mode returns nothing, as many write it."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.a[1].eval()

    def eval(self) -> None:  # type: ignore[override]
        self.train(False)


class Entry(nn.Conv2d):
    """A step-down that does so, too."""

    def __init__(self) -> None:
        super().__init__(3, 8, 2, 2)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Unsized(Silent):
    """It goes by what an operation raises."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = x.view(x.shape[0], 7, -1)
        except RuntimeError:
            x = x * 2
        return super().forward(x)


def test_what_sets_a_mode_may_return_nothing() -> None:
    silent = Silent(nn.Identity())
    net = detachnet.make_detachable(silent, ["a"], (3, 16, 16), stepdown=lambda i, f: Entry())
    x = torch.randn(4, 3, 16, 16)
    base = net.eval().detach("base")
    assert not base.training
    assert torch.equal(base(x), net(x))
    assert torch.equal(net.detach("sub0")(x), net(x, which="sub0"))
    assert answer(silent, (3, 16, 16)) is not None
    with pytest.raises(detachnet.TraceError, match="Unsized: it runs, but not without values"):
        detachnet.make_detachable(Unsized(nn.Identity()), ["a"], (3, 16, 16))


def test_sharing_leaves_the_mode_of_the_family_alone() -> None:
    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8)).train()
    net.detach("sub0", share=True)
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(net: detachnet.DetachableNet, again: object) -> None:
    net.active = "sub1"
    for module in (net, net.detach("sub0")):
        assert torch.equal(again(module)(IMAGES), module(IMAGES))  # type: ignore[operator]


def test_private_norms_are_copies_and_shared_ones_are_not() -> None:
    private = detachnet.make_detachable(models.Plain(), ["conv1", "pool"], (3, 8, 8), norm="private")
    names = [name for name, _ in private.norms.named_parameters()]
    layers = ("sub0.bn1", "sub0.bn2", "sub1.bn2")
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    shared = detachnet.make_detachable(models.Plain(), ["conv1", "pool"], (3, 8, 8), norm="shared")
    assert not list(shared.norms.parameters())


def test_every_parameter_gets_a_gradient_and_only_a_models_own(net: detachnet.DetachableNet) -> None:
    net.train()
    for name in net.names:
        net.zero_grad()
        net(IMAGES, which=name).sum().backward()
        used = {key for key, p in net.named_parameters() if p.grad is not None}
        assert used == set(net.parameters_of([name]))
    assert set(net.parameters_of(net.names)) == set(dict(net.named_parameters()))


def test_channels_last_and_devices(net: detachnet.DetachableNet) -> None:
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(IMAGES, which="sub1"), net(IMAGES, which="sub1"))
    on_meta = copy.deepcopy(net).to("meta")
    assert on_meta(IMAGES.to("meta"), which="all")["sub1"].shape == (4, 5)


class Sensitive(nn.Module):
    """Flags, hooks and buffers that surgery could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.Plain()
        self.net.bn1.eval()
        self.net.conv2.weight.requires_grad_(False)
        self.seen: list[str] = []
        self.net.register_forward_hook(lambda *_: self.seen.append("forward"))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("cuts", [["net.pool"], ["net.nothing"], ["net.fc"]])
def test_the_users_model_comes_back_as_it_was(cuts: list[str]) -> None:
    model = Sensitive()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    options = dict(vars(torch.backends.cudnn))
    random_state = torch.get_rng_state()
    try:
        net = detachnet.make_detachable(model, cuts, (3, 8, 8))
        net.train()(IMAGES, which="all")
    except detachnet.CutError:
        assert cuts != ["net.pool"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [value.data_ptr() for value in model.state_dict().values()] == pointers
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert model.seen == []
    assert dict(vars(torch.backends.cudnn)) == options


def test_tracing_puts_torch_back_after_a_failure() -> None:
    before = torch.zeros
    with pytest.raises(detachnet.TraceError):
        detachnet.find_cuts(models.ControlFlow(), (3, 8, 8))
    assert torch.zeros is before


def test_the_family_keeps_the_flags_of_the_model() -> None:
    net = detachnet.make_detachable(Sensitive(), ["net.pool"], (3, 8, 8))
    assert not net.base.net.bn1.training  # type: ignore[union-attr]
    assert not net.base.net.conv2.weight.requires_grad  # type: ignore[union-attr]


def test_plan_prints_and_round_trips(net: detachnet.DetachableNet) -> None:
    assert detachnet.DetachPlan.model_validate_json(net.plan.model_dump_json()) == net.plan
    text = str(net.plan)
    assert text == (Path(__file__).parents[1] / "golden" / "plan.txt").read_text().rstrip("\n")


AWKWARD: list[tuple[nn.Module, str, dict[str, Any]]] = [
    (models.BatchAware(), "conv1", {}),
    (models.Tokens(), "norm", {}),
    (models.Gated(), "conv1", {}),
    (models.UsesFunction(), "conv1", {"leaf_functions": [models.threshold]}),
]


@pytest.mark.parametrize(("model", "cut", "options"), AWKWARD)
@torch.no_grad()
def test_detached_models_are_plain_modules(model: nn.Module, cut: str, options: dict[str, Any]) -> None:
    net = detachnet.make_detachable(model, [cut], (3, 8, 8), **options).eval()
    detached = net.detach("sub0")
    again = pickle.loads(pickle.dumps(detached))
    assert not any(module.training for module in again.modules())
    compiled = torch.compile(detached, backend="eager")
    for one in (detached, again, pickle.loads(pickle.dumps(again)), copy.deepcopy(detached), compiled):
        assert torch.equal(one(IMAGES), net(IMAGES, which="sub0"))
    assert not isinstance(detached, torch.fx.GraphModule)
    assert str(detached) == repr(detached) == repr(again)
    assert str(detached).startswith("sub0(\n  (stepdown): ")
    copy.deepcopy(detached).get_parameter("stepdown.bias" if cut != "norm" else "stepdown.conv.bias").data.add_(1)
    assert torch.equal(detached(IMAGES), net(IMAGES, which="sub0"))


@pytest.mark.filterwarnings("ignore")
def test_torch_export(net: detachnet.DetachableNet) -> None:
    detached = net.detach("sub1")
    exported = torch.export.export(detached, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), detached(IMAGES))


def test_a_layer_that_is_replaced_is_run() -> None:
    net = detachnet.make_detachable(
        detachnet.create_model("detachnet:vgg16_cifar", width=0.03), ["features.6"]
    ).eval()
    images = torch.randn(1, 3, 32, 32)
    detached = net.detach("sub0")
    for model in (net, detached):
        model(images)  # writes the graph
    net.base.classifier = detached.classifier = torch.nn.Linear(detached.classifier.in_features, 7)
    assert net(images, which="sub0").shape == detached(images).shape == (1, 7)


def test_a_family_is_one_line() -> None:
    net = detachnet.make_detachable(models.Plain(), ["conv1"], (3, 8, 8))
    assert repr(net) == (
        "DetachableNet(Plain on 3×8×8 images, names=['base', 'sub0'], active='base', norm='private')"
    )
    assert "(conv1): Conv2d" in repr(net.base)


def test_mistakes_with_a_family() -> None:
    net = detachnet.make_detachable(models.Plain(), ["conv1"], (3, 8, 8))
    with pytest.raises(detachnet.CutError, match="no model is called 1"):
        net(torch.zeros(1, 3, 8, 8), which=1)  # type: ignore[call-overload]
    with pytest.raises(detachnet.CutError, match=r"the model is a family already: DetachableNet[\s\S]*net\.base"):
        detachnet.make_detachable(net, ["conv1"], (3, 8, 8))


def test_a_batch_is_no_image_size() -> None:
    resnet = detachnet.create_model("timm:resnet10t")
    with pytest.raises(
        detachnet.TraceError, match=r"not of a batch, \(8, 3, 64, 64\)\n  try      input_size=\(3, 64, 64\)"
    ):
        detachnet.make_detachable(resnet, ["layer1"], (8, 3, 64, 64))
    with pytest.raises(
        detachnet.TraceError, match=r"not a tensor\n  try      input_size=\(3, 64, 64\), or example_input"
    ):
        detachnet.make_detachable(resnet, ["layer1"], torch.zeros(8, 3, 64, 64))  # type: ignore[arg-type]
    with pytest.raises(detachnet.TraceError, match=r"without the batch that is \(3, 8, 8\)"):
        detachnet.make_detachable(models.Plain(), ["conv1"], (2, 3, 8, 8))


@pytest.mark.parametrize(
    ("size", "meant"),
    [
        ((8, 8, 3), r"with the channels first that is \(3, 8, 8\)"),
        ((3, 8), r"with height and width that is \(3, 8, 8\)"),
        ((8, 8), r"with the model's channels that is \(3, 8, 8\)"),
        ((1, 8, 8), r"its first convolution takes \(3, 8, 8\)"),
    ],
)
def test_a_size_of_other_axes_says_what_may_be_meant(size: tuple[int, ...], meant: str) -> None:
    with pytest.raises(detachnet.TraceError, match=meant):
        detachnet.make_detachable(models.Plain(), ["conv1"], size)


def test_what_is_no_family_is_refused_by_name(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    detachnet.save(nn.DataParallel(net), tmp_path / "family.safetensors")
    takers: list[Callable[[Any], object]] = [
        lambda given: detachnet.save(given, tmp_path / "no.safetensors"),
        lambda given: detachnet.export(given, tmp_path / "no"),
        lambda given: detachnet.recalibrate(given, [IMAGES]),
        lambda given: detachnet.evaluate(given, []),  # type: ignore[arg-type]
        lambda given: detachnet.search(given, [], [0.5]),  # type: ignore[arg-type]
        lambda given: detachnet.profile(given),
    ]
    for take in takers:
        with pytest.raises(
            detachnet.TraceError, match=r"takes a family of networks, not Plain[\s\S]*make_detachable"
        ):
            take(models.Plain())
        with pytest.raises(detachnet.TraceError, match=r"not AveragedModel[\s\S]*net\.module"):
            take(AveragedModel(net))
    assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize("kind", ["module", "weight", "default", "itself"])
def test_a_function_that_holds_parts_of_the_model_is_refused(kind: str) -> None:
    model = models.Plain()
    forward, weight = model.fc.forward, model.fc.weight

    def by_default(x: Tensor, run: Callable[[Tensor], Tensor] = forward) -> Tensor:
        return run(x)

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "module": lambda x: 2 * forward(x),
        "weight": lambda x: x @ weight.T,
        "default": by_default,
        "itself": lambda x: model.bn2(x[:, :, None, None])[:, :5, 0, 0],
    }
    model.fc.forward = functions[kind]  # type: ignore[method-assign]
    with pytest.raises(
        detachnet.TraceError, match=r"cannot copy Plain: 'fc\.forward' is a function that holds[\s\S]*MethodType"
    ):
        detachnet.make_detachable(model, ["pool"], (3, 8, 8))
    model.fc.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight), model.fc)  # type: ignore[method-assign]
    net = detachnet.make_detachable(model, ["pool"], (3, 8, 8))
    net(IMAGES, which="all")["sub0"].sum().backward()
    assert net.base.fc.weight.grad is not None
    assert model.fc.weight.grad is None


@dataclass
class Output:
    logits: Tensor
    feature: Tensor


class WithOutput(models.Plain):
    def forward(self, x: Tensor) -> Any:
        feature = self.conv2(self.pool(self.bn1(self.conv1(x)).relu()))
        return Output(self.fc(feature.mean((2, 3))), feature=feature)


@pytest.mark.slow
def test_outputs_of_a_dataclass_train_and_are_exported(tmp_path: Path) -> None:
    cuts = {"sub0": "pool", "half": SubModel(width=0.5)}
    net = detachnet.make_detachable(WithOutput(), cuts, (3, 8, 8), head="private").train()
    outputs: Any = net(IMAGES, which="all")
    detachnet.MultiModelLoss({})(outputs, torch.zeros(4, dtype=torch.int64)).backward()
    assert all(isinstance(output, Output) for output in outputs.values())
    net.eval()
    joint, alone = net(IMAGES, which="all"), net.detach("sub0")(IMAGES)
    for name in net.names:
        torch.testing.assert_close(vars(joint[name]), vars(net(IMAGES, which=name)))
    torch.testing.assert_close(vars(joint["sub0"]), vars(alone))
    detachnet.export(net, tmp_path / "exported", models=["sub0"])
    found = detachnet.Family.load(tmp_path / "exported").run(IMAGES[:1], "sub0")
    torch.testing.assert_close(torch.as_tensor(found.output), alone.logits[:1])


class Trained(models.Around):
    """Does more in training mode: a dropout, a gain, and with `extra` a layer."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__(nn.Conv2d(8, 8, 1))
        self.extra = nn.Conv2d(8, 8, 1) if extra else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, self.training)
        if self.training:
            x = x * 1.5 if self.extra is None else self.extra(x)
        logits: Tensor = self.fc(self.b(self.mid(x)).relu().mean((2, 3)))
        return logits


@pytest.mark.parametrize("name", ["inner", "narrow"])
def test_detached_models_train_as_they_do_in_their_family(name: str) -> None:
    subs = {"inner": SubModel(drop=["a:mid"]), "narrow": SubModel(width=0.5)}
    net, x = detachnet.make_detachable(Trained(), subs, (3, 16, 16)), torch.randn(4, 3, 16, 16)
    detached = net.detach(name)
    again = [detached, pickle.loads(pickle.dumps(detached)), copy.deepcopy(detached)]
    torch.testing.assert_close(detached(x), net.eval()(x, which=name))
    torch.manual_seed(1)
    trained = net.train()(x, which=name)
    for module in (*again, net.detach(name, share=True)):
        torch.manual_seed(1)
        torch.testing.assert_close(module.train()(x), trained)


def test_layers_of_the_training_mode_stay_with_the_family(caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(Trained(extra=True), {"behind": "a"}, (3, 16, 16))
    detached = net.detach("behind")
    assert not caplog.text
    detached.train()
    assert "behind has no 'extra', which its base-model has in training mode" in caplog.text
    assert "extra.weight" not in detached.state_dict()
    detached(torch.randn(4, 3, 16, 16))
