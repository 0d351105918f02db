import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import detachnet
from detachnet.surgery.stepdown import Stem, build_stepdown, plan_stepdown, solve
from tests import models
from tests.helpers import shift


@pytest.mark.slow
@given(st.integers(1, 400), st.data())
def test_sizes_map_exactly_and_every_pixel_is_read(size: int, data: st.DataObject) -> None:
    out = data.draw(st.integers(1, size))
    kernel, stride, padding = solve(size, out)
    assert (size + 2 * padding - kernel) // stride + 1 == out
    assert stride <= kernel
    assert padding < kernel
    assert (out - 1) * stride + kernel - padding >= size


@given(st.integers(1, 60), st.integers(1, 60))
def test_where_sizes_divide_it_is_the_papers(out: int, factor: int) -> None:
    assert solve(out * factor, out) == (factor, factor, 0)


@settings(max_examples=30)
@given(st.tuples(st.integers(4, 30), st.integers(4, 30)), st.data())
def test_modules_map_images_to_features(size: tuple[int, int], data: st.DataObject) -> None:
    feature = (5, data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1])))
    plan = plan_stepdown((3, *size), feature)
    module = build_stepdown(plan)
    assert module(torch.zeros(2, 3, *size)).shape == (2, *feature)
    assert plan.num_params == sum(p.numel() for p in module.parameters())


@pytest.mark.slow
@settings(max_examples=60)
@given(
    st.tuples(st.integers(4, 40), st.integers(4, 40)),
    st.sampled_from([Stem(), Stem(depth=2), Stem(width=0.5), Stem(depth=3, width=2)]),
    st.sampled_from(["map", "channels last", "tokens"]),
    st.data(),
)
def test_stems_map_images_to_features(size: tuple[int, int], stem: Stem, kind: str, data: st.DataObject) -> None:
    grid = tuple(max(1, n // data.draw(st.sampled_from([1, 2, 3, 4, 8]))) for n in size)
    feature = {"map": (24, *grid), "channels last": (*grid, 24), "tokens": (grid[0] * grid[1], 24)}[kind]
    try:
        plan = plan_stepdown((3, *size), feature, stem)
    except detachnet.StepDownError:
        assert kind != "map"  # a grid far from the image's proportions is not recognized
        return
    module = build_stepdown(plan).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert module(torch.zeros(2, 3, *size)).shape == (2, *feature)
    assert plan.macs == counter.get_total_flops() // 4
    assert plan.num_params == sum(p.numel() for p in module.parameters())


def test_a_stem_halves_the_size_and_doubles_the_channels() -> None:
    plan = plan_stepdown((3, 32, 32), (64, 4, 4), "stem")
    assert [(s.num_chs, s.size, s.kernel, s.stride) for s in plan.stages] == [
        (16, (16, 16), (3, 3), (2, 2)),
        (32, (8, 8), (3, 3), (2, 2)),
        (64, (4, 4), (3, 3), (2, 2)),
    ]
    assert (str(plan), plan.reduction) == ("stem 16→32→64", 8)


@pytest.mark.parametrize(("feature", "linear"), [((6, 2, 2), False), ((2, 2, 6), True), ((4, 6), True)])
def test_a_stem_is_convolutions_norms_and_relus(feature: tuple[int, ...], linear: bool) -> None:
    """Computed with torch's functions; in front of tokens and channels-last maps the last one is linear."""
    plan = plan_stepdown((3, 8, 8), feature, "stem")
    module, (one, two) = build_stepdown(plan).train(), plan.stages
    images = torch.randn(5, 3, 8, 8)
    weights = {name: tensor for name, tensor in module.state_dict().items() if name.endswith(("weight", "bias"))}
    first, scale, shift, second, *rest = weights.values()
    x = F.conv2d(images, first, None, one.stride, one.padding)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    x = (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).clamp_min(0)
    x = F.conv2d(x, second, rest[0] if linear else None, two.stride, two.padding)
    if not linear:
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        x = x.clamp_min(0)
    found = module(images)
    wanted = x if not linear else x.movedim(1, -1).reshape(5, *feature)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found.min() < 0) == linear


def test_flat_feature_gets_a_linear_layer() -> None:
    plan = plan_stepdown((3, 4, 4), (7,))
    assert build_stepdown(plan)(torch.zeros(2, 3, 4, 4)).shape == (2, 7)
    assert plan.macs == 3 * 4 * 4 * 7


def test_video() -> None:
    plan = plan_stepdown((3, 16, 32, 32), (8, 4, 8, 8))
    assert build_stepdown(plan)(torch.zeros(1, 3, 16, 32, 32)).shape == (1, 8, 4, 8, 8)


def test_a_feature_larger_than_the_image_is_refused() -> None:
    with pytest.raises(detachnet.StepDownError, match="4×16×16 is larger than the image 3×8×8"):
        plan_stepdown((3, 8, 8), (4, 16, 16))


class Enlarging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.head = nn.Conv2d(4, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(x)).mean((2, 3))


def test_an_image_smaller_than_the_feature() -> None:
    with pytest.raises(detachnet.StepDownError, match="4×16×16 is larger than the image"):
        detachnet.make_detachable(Enlarging(), ["up"], (3, 8, 8))
    assert [p.name for p in detachnet.find_cuts(Enlarging(), (3, 8, 8))] == []


def test_own_stepdown() -> None:
    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), stepdown=shift)
    assert net(torch.zeros(1, 3, 8, 8), which="sub0").shape == (1, 5)
    assert net.plan["sub0"].num_params == sum(p.numel() for p in net.detach("sub0").parameters())


def test_own_stepdown_of_the_wrong_shape() -> None:
    with pytest.raises(detachnet.StepDownError, match="gives 3×8×8, the cut needs 4×4×4"):
        detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), stepdown=lambda i, f: nn.Identity())


@pytest.mark.parametrize("wrong", ["magic", None, Stem, {"sub0": "conv"}])
def test_unknown_stepdown(wrong: object) -> None:
    with pytest.raises(detachnet.CutError, match="stepdown is 'conv', 'stem', 'identity', a Stem or"):
        detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), stepdown=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("feature", "layout", "prefix"),
    [
        ((197, 1024), "tokens", 1),
        ((196, 1024), "tokens", 0),
        ((50, 768), "tokens", 1),
        ((60, 196), "tokens_last", 0),
    ],
)
def test_which_axis_is_the_grid(feature: tuple[int, int], layout: str, prefix: int) -> None:
    plan = plan_stepdown((3, 224, 224), feature)
    assert (plan.layout, plan.prefix) == (layout, prefix)
