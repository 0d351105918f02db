"""Family + split -> accuracy: numbers are tested with the trainings they belong to, here what else it does."""

from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import detachnet
from detachnet.data.batches import Batches
from detachnet.data.datasets import Split, describe_data, load_data
from detachnet.deploy.cascade import calibrate
from detachnet.evaluation import evaluate, predict, score_batches
from detachnet.facts import DataInfo
from detachnet.training.start import check_classes
from tests import models


@pytest.fixture
def images() -> Split:
    split = load_data("cifar10-mini")[1]
    return Split(split.images[:20], split.labels[:20], split.classes)


@pytest.fixture
def net(images: Split) -> detachnet.DetachableNet:
    """A family that trains on a frozen base-model."""
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(model, ["features.6", "features.23"], check="none").train()
    net.facts = net.facts.updated(data=describe_data("cifar10-mini", (images, images)))
    net.base.eval()
    return net


def modes(net: detachnet.DetachableNet) -> dict[str, bool]:
    return {name: module.training for name, module in net.named_modules()}


@pytest.mark.slow
def test_every_submodule_keeps_its_mode(net: detachnet.DetachableNet, images: Split) -> None:
    before = modes(net)
    assert len(set(before.values())) == 2
    evaluate(net, images)
    assert modes(net) == before


@pytest.mark.slow
def test_the_family_stays_where_it_is_or_comes_back(
    net: detachnet.DetachableNet, images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no other device everywhere: a family that only says it moves stands for one that does."""
    moves: list[str] = []
    monkeypatch.setattr(detachnet.DetachableNet, "to", lambda self, device: moves.append(str(device)))
    detachnet.evaluate(net, images)
    assert moves == []
    with pytest.raises(RuntimeError, match="meta"):
        detachnet.evaluate(net, images, "meta")
    assert moves == ["meta", "cpu"]


def test_every_submodule_keeps_its_mode_after_a_failure(net: detachnet.DetachableNet, images: Split) -> None:
    before = modes(net)
    labels = torch.full_like(images.labels, 99)
    said = "an image is of class 99, counted from 0; base has 10 outputs"
    with pytest.raises(detachnet.DataError, match=said):
        evaluate(net, Split(images.images, labels, images.classes))
    assert modes(net) == before


@pytest.mark.parametrize("label", [-100, -1, 10])
def test_labels_of_no_class_are_refused(net: detachnet.DetachableNet, images: Split, label: int) -> None:
    labels = images.labels.clone()
    labels[3] = label
    said = f"an image is of class {label}, counted from 0; base has 10 outputs"
    hint = "leave out images without a class" if label < 0 else "of the classes that it was trained on"
    split = Split(images.images, labels, images.classes)
    given = [(batch, labels[i : i + 1]) for i, batch in enumerate(torch.zeros(5, 1, 3, 32, 32))]
    for ask in (lambda: evaluate(net, split), lambda: evaluate(net, given), lambda: calibrate(net, split)):
        with pytest.raises(detachnet.DataError, match=rf"{said}\n  try +.*{hint}"):
            ask()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_families_of_another_precision(net: detachnet.DetachableNet, images: Split, dtype: torch.dtype) -> None:
    expected = evaluate(net, images)
    net.to(dtype)
    assert evaluate(net, images)["base"]["loss"] == pytest.approx(expected["base"]["loss"], rel=0.02)
    assert calibrate(net, images).num_calibration == 10
    batches = [images for images, _ in Batches(images, net.facts.known_data, 10).epoch()]
    detachnet.recalibrate(net, batches)


def test_a_device_is_not_waited_for_in_each_batch(
    net: detachnet.DetachableNet, images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    for name in ("__int__", "__bool__", "item"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, own=own: (waits.append(""), own(self))[1])
    counts = []
    for size in (20, 2):
        waits.clear()
        score_batches(net, Batches(images, net.facts.known_data, size), ["base"])
        counts.append(len(waits))
    assert counts[0] == counts[1]


def test_images_of_other_channels_are_refused(net: detachnet.DetachableNet, images: Split) -> None:
    grey = Split(images.images[:, :1], images.labels, images.classes)
    with pytest.raises(detachnet.DataError, match="the images have 1 channel, the family takes 3"):
        evaluate(net, grey)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda s: Split(s.images / 255, s.labels, s.classes), "uint8, not .* of float32[\\s\\S]*byte"),
        (
            lambda s: Split(s.images[0], s.labels, s.classes),
            r"\(N, C, H, W\) of uint8, not \(3, 32, 32\) of uint8",
        ),
        (lambda s: Split(s.images.numpy(), s.labels, s.classes), "not ndarray"),
        (lambda s: Split(s.images, s.labels.int(), s.classes), "int64, not .* of int32"),
        (lambda s: Split(s.images, s.labels.tolist(), s.classes), "not list"),
        (lambda s: Split(s.images, s.labels[:7], s.classes), "20 images and 7 labels"),
    ],
)
def test_what_is_no_split_is_refused(
    net: detachnet.DetachableNet, images: Split, given: Any, message: str
) -> None:
    with pytest.raises(detachnet.DataError, match=message):
        evaluate(net, given(images))


def test_labels_that_are_no_numbers_of_classes_are_refused(net: detachnet.DetachableNet, images: Split) -> None:
    normalized = torch.randn(len(images), 3, 32, 32)
    expected = evaluate(net, [(normalized, images.labels)])
    assert evaluate(net, [(normalized, images.labels.int())]) == expected
    for labels in (images.labels.float(), torch.eye(10)[images.labels]):
        with pytest.raises(detachnet.DataError, match=r"the number of each image's class, \(B,\), not"):
            evaluate(net, [(normalized, labels)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(net: detachnet.DetachableNet, images: Split) -> None:
    with pytest.raises(detachnet.MeasurementError, match="no device 'cuda'"):
        evaluate(net, images, "cuda")


def test_classes_in_another_order_are_refused(net: detachnet.DetachableNet, images: Split) -> None:
    other = Split(images.images, images.labels, (*images.classes[:-2], images.classes[-1], images.classes[-2]))
    with pytest.raises(detachnet.DataError, match="'truck' is class 9 there"):
        evaluate(net, other)


def test_looking_for_the_classes_keeps_modes(net: detachnet.DetachableNet) -> None:
    before = modes(net)
    check_classes(net)
    assert modes(net) == before


def test_a_data_loader_is_evaluated_on(net: detachnet.DetachableNet, images: Split) -> None:
    data = net.facts.known_data
    normalized = list(Batches(images, data, batch_size=7).epoch())
    expected = evaluate(net, images)
    for given in (
        normalized,
        iter(normalized),
        DataLoader(ConcatDataset([TensorDataset(*b) for b in normalized])),
    ):
        found = evaluate(net, given)
        for name, score in expected.items():
            assert found[name] == pytest.approx(score)


def test_images_are_left_alone_by_models_that_change_theirs() -> None:
    middle = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.ReLU())
    net = detachnet.make_detachable(models.ChangesImages(middle), ["a"], (3, 8, 8)).eval()
    data = DataInfo(name="five", classes=tuple("abcde"), mean=(0.5,) * 3, std=(0.2,) * 3)
    net.facts = detachnet.Facts(data=data, trained=("base",))
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4))
    before = batch[0].clone()
    assert evaluate(net, [batch]) == evaluate(net, [batch])
    assert predict(net, batch[0], "sub0") == predict(net, batch[0], "sub0")
    detachnet.span_importance(net.base, *batch)
    assert torch.equal(batch[0], before)


def test_batches_of_other_channels_are_refused_where_the_base_model_alone_was_trained(
    net: detachnet.DetachableNet,
) -> None:
    net.facts = net.facts.updated(trained=("base",))
    with pytest.raises(detachnet.DataError, match="the images have 1 channel, the family takes 3"):
        evaluate(net, [(torch.randn(4, 1, 32, 32), torch.arange(4))])


def test_nothing_to_evaluate_on(net: detachnet.DetachableNet, images: Split) -> None:
    for given in ([], iter(()), images.part(0, 0)):
        with pytest.raises(detachnet.DataError, match="there are no images to evaluate on"):
            evaluate(net, given)


@pytest.mark.parametrize("given", [5, [1, 2], [torch.ones(2, 3, 32, 32)], [(torch.ones(2, 3, 32, 32), [0, 1])]])
def test_no_images(net: detachnet.DetachableNet, given: Any) -> None:
    with pytest.raises(detachnet.DataError, match=r"no (batches|pair) of images and labels") as caught:
        evaluate(net, given)
    assert "DataLoader of (images, labels)" in str(caught.value)
