"""Routes chosen under a budget: within it, and no other route loses less."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import detachnet
from detachnet import CutError
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.choice import choose_routes
from detachnet.surgery.spans import span_places
from detachnet.surgery.trace import trace


def block(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.ReLU())


def chain(blocks: int = 5) -> nn.Module:
    """One stage of equal blocks between a stem and a head."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU())
    head = nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(stem, *(block(4) for _ in range(blocks)), head)


SIZE = (3, 8, 8)


def chosen(
    model: nn.Module, *shares: float, size: tuple[int, ...] = SIZE, **options: Any
) -> list[tuple[str, ...]]:
    return [route.drop for route in choose_routes(trace(model, size), shares, **options)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("detachnet:vgg16_cifar", (3, 32, 32)),
        ("torchvision:resnet18", (3, 64, 64)),
        ("torchvision:mobilenet_v3_small", (3, 64, 64)),
        ("torchvision:densenet121", (3, 64, 64)),
        ("timm:convnext_atto", (3, 64, 64)),
        ("torchvision:swin_t", (3, 224, 224)),
    ],
)
def test_sub_models_have_what_they_may(name: str, size: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = detachnet.create_model(name, num_classes=5)
    shares = [0.75, 0.5, 0.35]
    plan = detachnet.make_detachable(model, input_size=size, sub_models=shares, check="none").plan
    assert plan.names == ("base", "sub0", "sub1", "sub2")
    for share, sub in zip(shares, plan.models[1:], strict=True):
        assert sub.macs <= share * plan.models[0].macs


def test_the_last_blocks_of_a_stage_go_and_never_its_first() -> None:
    model = torchvision.models.resnet50()
    routes = chosen(model, 0.8, 0.6, size=(3, 224, 224))
    starts = [span.partition(":")[0] for route in routes for span in route]
    assert starts
    assert all(start.startswith("layer") for start in starts)  # behind a block of the stage, not in front of it
    ends = [span.partition(":")[2] for route in routes for span in route]
    assert all(end in ("layer1", "layer2", "layer3", "layer4") for end in ends)


def test_what_is_left_out_is_spread_over_the_stages() -> None:
    (route,) = chosen(torchvision.models.resnet50(), 0.48, size=(3, 224, 224))
    assert len({span[:6] for span in route}) == len(route) >= 3


@pytest.mark.slow
def test_each_sub_model_is_another() -> None:
    routes = chosen(torchvision.models.densenet121(), 0.5, 0.4, 0.35, size=(3, 64, 64))  # with few places
    assert len(set(routes)) == 3


def test_a_chain_loses_exactly_what_the_budget_asks_for() -> None:
    # Closed form: the stem has 3·4·9, a block 4·4·9, the head 8 multiply-accumulates a pixel: 108 + 5·144 + 8.
    for left, share in ((1, 0.85), (2, 0.7), (3, 0.5)):
        (route,) = chosen(chain(), share)
        assert route == (f"{5 - left}:5",)
        assert 108 + (5 - left) * 144 + 8 <= share * 836 < 108 + (6 - left) * 144 + 8


def brute_force(count: int, cost: list[float], lost: list[float], budget: float) -> float:
    """The least loss of leaving out some steps of a stage that cost and lose so much."""
    return min(
        sum(itertools.compress(lost, left))
        for left in itertools.product((0, 1), repeat=count)
        if any(left) and sum(c for c, out in zip(cost, left, strict=True) if not out) <= budget
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_route_loses_less_by_measured_importance(seed: int) -> None:
    torch.manual_seed(seed)
    count = 6
    lost = [round(value, 3) for value in (torch.rand(count) + 0.01).tolist()]
    cost = [round(value, 3) for value in (torch.rand(count) + 0.1).tolist()]
    names = [str(i) for i in range(count + 1)]
    costs = dict(zip(names[1:], cost, strict=True)) | {"0": 0.0, "": 0.0}
    model, traced = chain(count), trace(chain(count), SIZE)
    places = [traced.eval.name_of[node] for node in span_places(CutAnalysis(traced.eval))]
    assert places[: count + 1] == names
    costs |= dict.fromkeys(places[count + 1 :], 0.0)
    spans = dict(zip((f"{a}:{b}" for a, b in itertools.pairwise(names)), lost, strict=True))
    (route,) = chosen(model, 0.55, costs=costs, importance=spans)
    left = [any(int(s.split(":")[0]) < i <= int(s.split(":")[1]) for s in route) for i in range(1, count + 1)]
    kept = sum(c for c, out in zip(cost, left, strict=True) if not out)
    assert kept <= 0.55 * sum(cost) * (1 + 1e-6)
    best = brute_force(count, cost, lost, 0.55 * sum(cost))
    assert sum(itertools.compress(lost, left)) == pytest.approx(best, abs=2e-3)


def test_costs_say_what_is_worth_leaving_out() -> None:
    model = torchvision.models.resnet18(num_classes=5)
    traced = trace(model, (3, 64, 64))
    names = [traced.eval.name_of[node] for node in span_places(CutAnalysis(traced.eval))]
    slow = dict.fromkeys([*names, ""], 1.0) | {"layer2": 100.0}
    assert [r.drop for r in choose_routes(traced, [0.5], costs=slow)] == [("layer2.0:layer2",)]


@pytest.mark.slow
def test_the_least_important_span_goes() -> None:
    model = torchvision.models.resnet18(num_classes=5)
    spans = [span.name for span in detachnet.find_spans(model, (3, 64, 64)) if span.bridge is None]
    for least in spans[1:]:
        lost = dict.fromkeys(spans, 1.0) | {least: 0.1}
        assert chosen(model, 0.9, size=(3, 64, 64), importance=lost) == [(least,)]


@pytest.mark.slow
def test_importance_is_the_loss_without_a_block() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).train()
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32))  # statistics that are not those of a new layer
    images, target = torch.randn(20, 3, 32, 32), torch.randint(5, (20,))
    lost = detachnet.span_importance(model, images, target, batch=7)
    assert model.training
    with torch.no_grad():
        whole = nn.functional.cross_entropy(model.eval()(images), target)
        model.layer3[1] = nn.Identity()
        without = nn.functional.cross_entropy(model(images), target)
    assert lost["layer3.0:layer3"] == pytest.approx(float(without - whole), abs=1e-5)
    assert len(lost) == sum(span.bridge is None for span in detachnet.find_spans(model, (3, 32, 32))) + 1


def test_importance_needs_images_and_spans() -> None:
    model = torchvision.models.resnet18(num_classes=5)
    with pytest.raises(CutError, match="not on 2 and 3"):
        detachnet.span_importance(model, torch.randn(2, 3, 32, 32), torch.zeros(3, dtype=torch.long))
    with pytest.raises(CutError, match="has no span that nothing needs to stand for"):
        detachnet.span_importance(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)),
            torch.randn(2, 3, 8, 8),
            torch.zeros(2, dtype=torch.long),
        )


@pytest.mark.slow
def test_auto_is_two() -> None:
    model = torchvision.models.resnet18(num_classes=5)
    make: Callable[..., detachnet.DetachableNet] = detachnet.make_detachable
    auto = make(model, input_size=(3, 64, 64), sub_models="auto", check="none").plan
    assert auto == make(model, input_size=(3, 64, 64), sub_models=2, check="none").plan
    assert auto.names == ("base", "sub0", "sub1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either cuts, sub_models or widths"),
        ({"cuts": ["layer1"], "sub_models": 2}, "give either cuts, sub_models or widths"),
        ({"cuts": ["layer1"], "importance": {}}, "costs and importance are for choosing sub_models"),
        ({"sub_models": 0}, "a family has 1 to 16 sub-models"),
        ({"sub_models": 10**9}, "a family has 1 to 16 sub-models"),
        ({"sub_models": True}, r"sub_models=True: give a number of sub-models, 'auto', or shares"),
        ({"sub_models": "two"}, r"sub_models='two': give a number"),
        ({"sub_models": []}, r"sub_models=\[\]: give a number"),
        ({"sub_models": [0.4, 0.7]}, "shares of the base-model's costs lie between 0 and 1 and fall"),
        ({"sub_models": [1.5]}, "shares of the base-model's costs lie between 0 and 1 and fall"),
        ({"sub_models": [0.001]}, r"no route with 0.1 % of its costs[\s\S]*the least is \d"),
        (
            {"sub_models": [0.0465, 0.046]},
            r"no route with 4.6 % of its costs that is not a larger sub-model's, \[",
        ),
        ({"sub_models": 2, "costs": {"layer1": 1.0}}, r"costs has no 'relu'[\s\S]*measure_segments"),
        ({"sub_models": 2, "importance": {"layer1:layer9": 1.0}}, r"no span of this model[\s\S]*nearest"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        detachnet.make_detachable(torchvision.models.resnet18(), input_size=(3, 64, 64), **options)


def test_negative_costs_are_refused() -> None:
    traced = trace(torchvision.models.resnet18(), (3, 64, 64))
    names = [traced.eval.name_of[node] for node in span_places(CutAnalysis(traced.eval))]
    with pytest.raises(CutError, match="costs are numbers from 0 on"):
        choose_routes(traced, [0.5], costs=dict.fromkeys([*names, ""], -1.0))
