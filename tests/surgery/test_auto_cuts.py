"""What a choice of cuts never does, over the convolutional networks that people cut."""

import itertools
import re

import pytest
import torch

import detachnet
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.cuts import cut_points
from detachnet.surgery.trace import trace
from tests.helpers import nightly_but

USUAL = [
    "torchvision:mobilenet_v3_large",
    "torchvision:resnet18",
    "torchvision:shufflenet_v2_x1_0",
    "timm:efficientnet_b0",
    "detachnet:vgg16_cifar",
]
CONVOLUTIONAL = [
    *USUAL,
    *(
        f"torchvision:{name}"
        for name in (
            *("alexnet", "vgg11", "vgg16_bn", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121"),
            *("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small"),
            *("efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "mnasnet1_0", "shufflenet_v2_x0_5"),
            *("regnet_x_400mf", "regnet_y_400mf", "convnext_tiny"),
        )
    ),
    *(
        f"timm:{name}"
        for name in (
            *("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
            *("mobilenetv4_conv_medium", "efficientnet_lite0", "tf_efficientnetv2_b0", "mixnet_s", "fbnetc_100"),
            *("ghostnet_100", "rexnet_100", "semnasnet_100", "spnasnet_100", "hardcorenas_a", "tinynet_a"),
            *("regnetx_004", "regnety_004", "repvgg_a0", "resnet26d", "resnet50", "resnest14d", "seresnet50"),
            *("dla34", "hrnet_w18_small", "vovnet39a", "cspresnet50", "darknet53", "selecsls42b", "mobileone_s0"),
            *("fastvit_t8", "convnext_atto", "efficientvit_b0", "lcnet_050", "edgenext_xx_small"),
        )
    ),
    "detachnet:resnet_cifar",
]


def built(name: str) -> torch.nn.Module:
    """The model, without weights where it can be made so."""
    try:
        with torch.device("meta"):
            return detachnet.create_model(name, num_classes=10)
    except detachnet.ModelError:
        return detachnet.create_model(name, num_classes=10)


def planned(name: str, cuts: int, stepdown: str) -> detachnet.DetachPlan | None:
    """The plan; None where it is refused, with a way out that exists."""
    model = built(name)
    try:
        return detachnet.make_detachable(model, cuts, stepdown=stepdown, check="none").plan
    except detachnet.CutError as error:
        refusal = error
    assert re.search(r"has no cuts near \d", refusal.summary)
    assert f"sub_models={cuts}" in str(refusal)
    detachnet.make_detachable(model, sub_models=cuts, check="none")
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "stepdown"),
    nightly_but([(1, "conv"), (2, "stem"), (3, "conv")], itertools.product([1, 2, 3], ["conv", "stem"])),
)
@pytest.mark.parametrize("name", nightly_but(USUAL, CONVOLUTIONAL))
def test_chosen_cuts_pay(name: str, count: int, stepdown: str) -> None:
    plan = planned(name, count, stepdown)
    if plan is None:
        return
    base, *subs = plan.models
    step = 0.7 / (count + 1)
    for before, model in itertools.pairwise(plan.models):
        assert before.macs > model.macs
        assert (before.macs - model.macs) / base.macs >= step / 2
        assert model.num_params <= base.num_params
    for i, model in enumerate(subs):
        assert model.macs / base.macs == pytest.approx(0.85 - step * (i + 1), abs=0.15)
        assert model.stepdown is not None
        assert model.stepdown.kind == stepdown
    assert not [hint for hint in plan.hints if hint.startswith("sub")]


@pytest.mark.parametrize("name", nightly_but(USUAL[:1], CONVOLUTIONAL))
def test_nothing_is_chosen_behind_the_last_convolution(name: str) -> None:
    traced = trace(built(name))
    analysis = CutAnalysis(traced.eval)
    layers = [node for node in traced.eval.live if "Conv" in type(analysis.module_of(node)).__name__]
    sound = [point for point in cut_points(traced) if not point.caution]
    assert sound
    for point in sound:
        assert analysis.position[analysis.find(point.name)] < analysis.position[layers[-1]]


def test_a_cut_that_does_not_pay_says_why() -> None:
    points = {p.name: p for p in detachnet.find_cuts(detachnet.create_model("torchvision:mobilenet_v3_large"))}
    assert "behind the last convolution" in points["avgpool"].caution
    assert any(re.match(r"its step-down has .* parameters in place of", p.caution) for p in points.values())
    assert points["features.9"].caution == ""


@pytest.mark.slow
def test_shares_that_cannot_be_reached_are_said() -> None:
    model = detachnet.create_model("torchvision:shufflenet_v2_x1_0")
    plan = detachnet.make_detachable(model, [0.55], check="none").plan
    assert "sub0 keeps 63 % of the MACs, not 55 %: no better cut is nearer; sub_models= takes" in str(plan)
    assert "keeps" not in str(detachnet.make_detachable(model, [0.6], check="none").plan)
    with pytest.raises(detachnet.CutError, match="has no cuts near 30 % of its MACs") as error:
        detachnet.make_detachable(model, [0.3], check="none")
    assert "sub-models that drop the front keep 97, 93, 89" in str(error.value)


@pytest.mark.slow
def test_ends_of_blocks_are_preferred() -> None:
    plan = detachnet.make_detachable(detachnet.create_model("timm:efficientnet_b0"), [0.7, 0.4], check="none").plan
    assert [model.cut for model in plan.models[1:]] == ["blocks.3.0", "blocks.4"]


@pytest.mark.slow
def test_a_cut_by_name_that_does_not_pay_is_said() -> None:
    model = detachnet.create_model("torchvision:mobilenet_v3_large")
    plan = detachnet.make_detachable(model, ["avgpool"], check="none").plan
    assert "sub0: behind the last convolution: only the classifier is left" in str(plan)
