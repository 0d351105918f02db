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


def test_a_weight_without_a_model() -> None:
    with pytest.raises(detachnet.RecipeError, match="a loss weight for 'sub9', but no such model"):
        detachnet.MultiModelLoss({"sub9": 1.0})({"base": torch.randn(1, 2)}, torch.tensor([0]))
