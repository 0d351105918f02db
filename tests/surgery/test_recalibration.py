import copy
from pathlib import Path

import pytest
import torch
from detachnet_cli.app import app
from torch import nn
from typer.testing import CliRunner

import detachnet
from detachnet.data.batches import Batches
from detachnet.data.datasets import load_data
from detachnet.evaluation import EVAL_BATCH
from detachnet.surgery.recalibration import measure_statistics, recalibrate
from detachnet.training.trainer import train
from tests import models
from tests.runs import recipe

IMAGES = [torch.randn(8, 3, 32, 32) + i for i in range(3)]


@pytest.fixture
def net() -> detachnet.DetachableNet:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.1)
    return detachnet.make_detachable(
        model, ["features.6", "features.23"], (3, 32, 32), norm="shared", check="none"
    )


@pytest.mark.slow
def test_each_model_gets_the_statistics_of_its_own_features(net: detachnet.DetachableNet) -> None:
    before = copy.deepcopy(net.state_dict())
    fresh = recalibrate(net, IMAGES)
    assert fresh.plan.norm == "private"
    assert not fresh.training
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    for name in net.names:
        # The first norm of each model sees features that no other norm has changed.
        alone = net.detach(name).eval()
        norms = [m for m in alone.modules() if isinstance(m, nn.BatchNorm2d)]
        seen: list[torch.Tensor] = []
        norms[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].mean((0, 2, 3))))
        for images in IMAGES:
            alone(images)
        measured = next(m for m in fresh.detach(name).modules() if isinstance(m, nn.BatchNorm2d))
        torch.testing.assert_close(measured.running_mean, torch.stack(seen).mean(0))
        assert measured.momentum == 0.1


@pytest.mark.slow
def test_statistics_over_one_batch_are_those_of_training_mode(net: detachnet.DetachableNet) -> None:
    fresh = recalibrate(net, IMAGES[:1])
    for name in net.names:
        trained = copy.deepcopy(net).train()(IMAGES[0], which=name)
        # Training mode divides by n, running statistics by n - 1: the deepest maps have 8·2·2 values.
        torch.testing.assert_close(fresh(IMAGES[0], which=name), trained, rtol=0.1, atol=0.1)


def test_models_that_change_their_images_are_measured_on_the_same_ones() -> None:
    subs = {"short": detachnet.SubModel(drop=["a:mid"]), "narrow": detachnet.SubModel(width=0.5)}
    middle = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
    net = detachnet.make_detachable(models.ChangesImages(middle), subs, (3, 16, 16)).eval()
    batches = [torch.randn(8, 3, 16, 16) + i for i in range(2)]
    before = [images.clone() for images in batches]
    together = recalibrate(net, batches)
    torch.testing.assert_close(batches, before)
    for name in net.names:
        alone = net.with_private_norms().eval()
        measure_statistics(alone, before, (name,), own=False)
        images = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(together(images.clone(), which=name), alone(images.clone(), which=name))


def test_each_image_counts_alike_whatever_its_batch_and_how_many_models_run_a_norm() -> None:
    middle = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
    route = {"without": detachnet.SubModel(drop=["a:mid"])}
    net = detachnet.make_detachable(models.Around(middle), route, (3, 16, 16))
    images = torch.randn(17, 3, 16, 16) + torch.arange(17).reshape(-1, 1, 1, 1)
    fresh = recalibrate(net, images.split(8))
    assert net.plan.names == ("base", "without")
    features = net.base.a[0](images)
    torch.testing.assert_close(fresh.base.a[1].running_mean, features.mean((0, 2, 3)))
    assert fresh.base.a[1].momentum == 0.1
    assert not fresh.base.a[1]._forward_pre_hooks


def test_one_image_without_a_variance_is_refused_and_leaves_the_family_in_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(1))
    net = detachnet.make_detachable(model, ["0"], (3, 16, 16))
    images = torch.randn(9, 3, 16, 16)
    with pytest.raises(detachnet.DataError, match=r"one image has no variance of features 4×1×1[\s\S]*left over"):
        measure_statistics(net.eval(), images.split(8), net.names)
    assert net.norms.sub0.get_submodule("2").momentum == 0.1
    assert not any(module.training or module._forward_pre_hooks for module in net.modules())
    measure_statistics(net, images.split(3), net.names)


def test_dropout_stays_off() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout(0.9), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(1)
    )
    net = detachnet.make_detachable(model, ["0"], (3, 32, 32), norm="shared")
    one, other = (recalibrate(net, IMAGES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


@pytest.mark.slow
def test_a_private_family_keeps_its_weights(net: detachnet.DetachableNet) -> None:
    private = net.with_private_norms()
    fresh = recalibrate(private, IMAGES)
    for (name, one), (_, other) in zip(private.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not torch.equal(private.base.features[1].running_mean, fresh.base.features[1].running_mean)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    options = ("family.norm=shared", "train.epochs=1", "data.num_train=200", "data.pad=4", "data.flip=true")
    run = train(recipe(*options), tmp_path / "run").folder
    out = CliRunner().invoke(app, ["recalibrate", str(run.path), "-o", str(tmp_path / "new.safetensors")])
    assert out.exit_code == 0, out.output
    assert "n = 1000; statistics of 200 training images" in out.output
    fresh = detachnet.load(tmp_path / "new.safetensors")
    assert fresh.plan.norm == "private"
    net, images = detachnet.load(run.last), load_data("cifar10-mini")[0].part(0, 200)
    batches = Batches(images, net.facts.known_data, EVAL_BATCH, pad=4, flip=True)  # as in the training
    for (name, value), expected in zip(
        fresh.named_buffers(), recalibrate(net, batches.epoch()).buffers(), strict=True
    ):
        assert torch.equal(value, expected), name
    assert f"{100 * fresh.facts.accuracy['sub1']:.2f} %" in out.output
    again = CliRunner().invoke(app, ["recalibrate", str(run.path), "-o", str(tmp_path / "new.safetensors")])
    assert again.exit_code == 2
    assert "exists already" in again.output


@pytest.mark.slow
def test_a_family_that_does_not_know_its_data(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    detachnet.save(net, tmp_path / "family.safetensors")
    args = ["recalibrate", str(tmp_path / "family.safetensors"), "-o", str(tmp_path / "new.safetensors")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert "does not say what it was trained on" in result.output


@pytest.mark.slow
def test_no_images(net: detachnet.DetachableNet) -> None:
    with pytest.raises(detachnet.DataError, match="no images to measure statistics on"):
        recalibrate(net, [])
    with pytest.raises(detachnet.DataError, match="no images to measure statistics on"):
        recalibrate(net, [torch.zeros(0, *net.plan.input_size)])
    for given, said in (
        (torch.zeros(2, 3, 32, 32), "no batches of images: Tensor"),
        ([None], "no tensor of images"),
        ([torch.zeros(2, 3, 32, 31)], "images of 3×32×31, but the family takes 3×32×32"),
    ):
        with pytest.raises(detachnet.DataError, match=said):
            recalibrate(net, given)  # type: ignore[arg-type]


@pytest.mark.slow
def test_pairs_of_images_and_labels(net: detachnet.DetachableNet) -> None:
    images = torch.randn(8, *net.plan.input_size)
    one, two = recalibrate(net, [images]), recalibrate(net, [(images, torch.zeros(8))])
    for name, buffer in one.named_buffers():
        assert torch.equal(two.get_buffer(name), buffer)


def test_heads_are_kept() -> None:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(
        model, ["features.6"], (3, 32, 32), norm="shared", head="private", check="none"
    )
    for parameter in net.heads.parameters():
        parameter.data += 1
    fresh = recalibrate(net, [torch.randn(4, 3, 32, 32)])
    assert torch.equal(fresh.heads.sub0.classifier.weight, net.heads.sub0.classifier.weight)


def test_a_head_that_holds_a_norm_is_kept_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(1), models.NormedHead(4, 5))
    net = detachnet.make_detachable(
        model, ["0"], (3, 8, 8), norm="shared", head="private", leaf_modules=[models.NormedHead]
    )
    fresh = recalibrate(net, [torch.randn(4, 3, 8, 8)])
    assert len(list(fresh.heads.parameters())) == len(list(net.heads.parameters())) == 4
    assert not {p.data_ptr() for p in fresh.heads.parameters()} & {p.data_ptr() for p in fresh.base.parameters()}


def test_statistics_of_other_layers_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = models.Around(nn.InstanceNorm2d(8, track_running_stats=True))
    family = detachnet.make_detachable(model, ["a"], (3, 16, 16), norm="shared")
    detachnet.recalibrate(family, [torch.randn(4, 3, 16, 16)])
    assert "the statistics of 'mid' stay as they are: only batch norms are measured" in caplog.text
