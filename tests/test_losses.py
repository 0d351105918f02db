from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import detachnet


def test_it_is_the_weighted_sum_of_cross_entropies() -> None:
    target = torch.tensor([0, 2, 1])
    outputs = {"base": torch.randn(3, 4), "sub0": torch.randn(3, 4)}
    plain, weighted = detachnet.MultiModelLoss(), detachnet.MultiModelLoss({"sub0": 0.3}, label_smoothing=0.1)
    one, other = (F.cross_entropy(out, target) for out in outputs.values())
    torch.testing.assert_close(plain(outputs, target), one + other)
    one, other = (F.cross_entropy(out, target, label_smoothing=0.1) for out in outputs.values())
    torch.testing.assert_close(weighted(outputs, target), one + 0.3 * other)


def test_auxiliary_outputs_are_passed_over() -> None:
    out, target = torch.randn(3, 4), torch.tensor([0, 2, 1])
    expected = F.cross_entropy(out, target)
    loss = detachnet.MultiModelLoss()
    for output in ((out, None), {"out": out, "aux": None}):
        torch.testing.assert_close(loss({"base": output}, target), expected)


def test_a_hint_without_features() -> None:
    outputs = {"base": torch.randn(1, 2), "sub0": torch.randn(1, 2)}
    with pytest.raises(detachnet.RecipeError, match=r"a hint needs features[\s\S]*features=True"):
        detachnet.MultiModelLoss(hint=1.0)(outputs, torch.tensor([0]))


def test_a_weight_without_a_model() -> None:
    with pytest.raises(detachnet.RecipeError, match="a loss weight for 'sub9', but no such model"):
        detachnet.MultiModelLoss({"sub9": 1.0})({"base": torch.randn(1, 2)}, torch.tensor([0]))


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean over images of sum(p log(p/q)), times the temperature squared."""
    p, q = (torch.softmax(x / temperature, 1) for x in (teacher, student))
    return (p * (p / q).log()).sum(1).mean() * temperature**2


@pytest.mark.parametrize("teacher", ["base", "larger"])
def test_distillation(teacher: str) -> None:
    target = torch.tensor([0, 2, 1])
    outputs = {name: torch.randn(3, 4, requires_grad=True) for name in ("base", "sub0", "sub1")}
    loss = detachnet.MultiModelLoss(distillation=0.7, temperature=2.0, teacher=teacher)  # type: ignore[arg-type]
    losses = loss.per_model(outputs, target)
    teachers = {"sub0": "base", "sub1": "base" if teacher == "base" else "sub0"}
    torch.testing.assert_close(losses["base"], F.cross_entropy(outputs["base"], target))
    for name, above in teachers.items():
        expected = F.cross_entropy(outputs[name], target) + 0.7 * divergence(outputs[name], outputs[above], 2.0)
        torch.testing.assert_close(losses[name], expected)
    (losses["sub0"] + losses["sub1"]).backward()
    assert outputs["base"].grad is None


def test_a_model_alone_has_no_teacher() -> None:
    out, target = torch.randn(3, 4), torch.tensor([0, 2, 1])
    loss = detachnet.MultiModelLoss(distillation=1.0)({"sub1": out}, target)
    torch.testing.assert_close(loss, F.cross_entropy(out, target))


def test_the_hint_is_the_relative_squared_error_of_the_feature() -> None:
    target = torch.tensor([0, 2, 1])
    outputs = {"base": torch.randn(3, 4), "sub0": torch.randn(3, 4)}
    feature, made = (torch.randn(3, 5, 2, 2, requires_grad=True) for _ in range(2))
    loss = detachnet.MultiModelLoss(hint=0.5)
    losses = loss.per_model(outputs, target, {"sub0": (feature, made)})
    torch.testing.assert_close(loss(outputs, target, {"sub0": (feature, made)}), sum(losses.values()))
    error = (feature - made).pow(2).sum() / feature.pow(2).sum()
    torch.testing.assert_close(losses["sub0"], F.cross_entropy(outputs["sub0"], target) + 0.5 * error)
    losses["sub0"].backward()
    assert feature.grad is None
    assert made.grad is not None


def test_probabilities_as_targets() -> None:
    outputs = {"base": torch.randn(4, 3), "sub0": torch.randn(4, 3)}
    target = torch.tensor([0, 2, 1, 1])
    loss = detachnet.MultiModelLoss(label_smoothing=0.1, distillation=1.0)
    hard = loss(outputs, target)
    torch.testing.assert_close(loss(outputs, F.one_hot(target, 3).float()), hard)
    half = 0.5 * (F.one_hot(target, 3) + F.one_hot(target.flip(0), 3)).float()
    torch.testing.assert_close(loss(outputs, half), 0.5 * (hard + loss(outputs, target.flip(0))))


def test_the_output_of_one_model_is_refused() -> None:
    with pytest.raises(
        detachnet.RecipeError, match=r"by name, not one Tensor\n  try      loss\(net\(images, which=\"all\"\)"
    ):
        detachnet.MultiModelLoss()(torch.randn(2, 3), torch.tensor([0, 1]))  # type: ignore[arg-type]
    with pytest.raises(detachnet.RecipeError, match="by name, not none"):
        detachnet.MultiModelLoss()({}, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher": "Base"}, "teacher is 'base' or 'larger', not 'Base'"),
        ({"temperature": 0}, "temperature is 0, not a finite number above 0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5, not in"),
        ({"distillation": float("nan")}, "distillation is nan, not a finite number from 0 on"),
        ({"distillation": "a"}, "distillation is 'a', not a finite number from 0 on"),
        ({"weights": {"base": -1.0}}, r"weights\['base'\] is -1.0, not a finite"),
        ({"weights": [1, 2]}, "weights is a weight for each model by its name"),
    ],
)
def test_what_is_out_of_its_range(options: Any, said: str) -> None:
    with pytest.raises(detachnet.RecipeError, match=said):
        detachnet.MultiModelLoss(**options)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (torch.zeros(3).long(), "the target is of 3 images, the outputs of 2"),
        (torch.zeros(2), r"whole numbers of int64, not float32\n  try +target.long"),
        (torch.zeros(2).int(), "whole numbers of int64, not int32"),
        (torch.zeros(2, 1).long(), r"the target has the shape \(2, 1\), not \(2,\), or \(2, 3\) of probabilities"),
    ],
)
def test_a_target_of_something_else(target: torch.Tensor, said: str) -> None:
    with pytest.raises(detachnet.DataError, match=said):
        detachnet.MultiModelLoss()({"base": torch.randn(2, 3)}, target)


def test_outputs_without_an_axis_for_classes() -> None:
    with pytest.raises(detachnet.DataError, match=r"the outputs have the shape \(2,\), not \(B, num_classes\)"):
        detachnet.MultiModelLoss()({"base": torch.randn(2)}, torch.zeros(2).long())


def test_weights_of_other_kinds_of_numbers() -> None:
    outputs, target = {"base": torch.randn(2, 3), "sub0": torch.randn(2, 3)}, torch.tensor([0, 1])
    half: Any = {"base": np.float32(0.5), "sub0": torch.tensor(0.5)}
    loss = detachnet.MultiModelLoss(half)(outputs, target)
    torch.testing.assert_close(loss, 0.5 * detachnet.MultiModelLoss()(outputs, target))
