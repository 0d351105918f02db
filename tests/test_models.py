"""The networks that detachnet brings along."""

import pytest
import torch
import torch.nn.functional as F

import detachnet
from detachnet.surgery.routes import SubModel
from tests.helpers import assert_joint_equals_separate

SECOND = [f"block{i}.act1:block{i}" for i in (1, 2, 3)]


def smooth(count: int) -> torch.Tensor:
    """Images whose neighbouring pixels are alike, `(count, 3, 32, 32)`."""
    return F.interpolate(torch.randn(count, 3, 8, 8), 32, mode="bilinear") + 0.1 * torch.randn(count, 3, 32, 32)


def test_filters_whiten_the_images_they_are_made_from() -> None:
    model, images = detachnet.create_model("detachnet:airbench", width=0.1), smooth(64)
    model.get_submodule("whiten").register_forward_hook(hook := Kept())
    state = torch.get_rng_state()
    model.initialize_from(images)  # type: ignore[operator]
    assert torch.equal(torch.get_rng_state(), state)
    model(images)
    one, negative = hook.output.detach().double().chunk(2, 1)
    torch.testing.assert_close(one, -negative)
    covariance = torch.cov(one.transpose(0, 1).flatten(1))
    patches = F.unfold(images.double(), 2).transpose(0, 1).flatten(1)
    values = torch.linalg.eigvalsh(torch.cov(patches))
    assert values[-1] > 50 * values[0]  # they were not white
    torch.testing.assert_close(covariance, torch.diag(values / (values + 5e-4)), atol=1e-4, rtol=0)


class Kept:
    """A hook that keeps a layer's output."""

    output: torch.Tensor

    def __call__(self, _layer: object, _inputs: object, output: torch.Tensor) -> None:
        self.output = output


def test_a_block_starts_as_the_identity_on_its_inputs() -> None:
    block = detachnet.create_model("detachnet:airbench").get_submodule("block2")
    x = torch.randn(2, 64, 6, 6)
    made = block.get_submodule("conv1")(x)
    torch.testing.assert_close(made[:, :64], x)
    assert not torch.allclose(made[:, 64:128], x, atol=0.1)
    torch.testing.assert_close(block.get_submodule("conv2")(made), made)


@pytest.mark.slow
def test_what_stays_frozen_in_a_family_gets_no_gradient() -> None:
    """Whitening filters and the norms' factors, private ones included; joint passes equal separate ones."""
    narrow = SubModel(width={f"block{i}": 0.6 for i in (1, 2, 3)})
    net = detachnet.make_detachable(
        detachnet.create_model("detachnet:airbench", width=0.1).double(),
        {"front": "block1", "short": SubModel(drop=SECOND), "narrow": narrow},
        head="private",
    )
    assert net.plan["narrow"].kept.keys() == {f"block{i}.conv{j}" for i in (1, 2, 3) for j in (1, 2)}
    outputs = net.train()(smooth(4).double(), which="all")
    torch.stack([out.square().sum() for out in outputs.values()]).sum().backward()
    frozen = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert frozen == {n for n in net.state_dict() if n == "base.whiten.weight" or n.endswith(NORM_WEIGHTS)}
    net.zero_grad()
    assert_joint_equals_separate(net, smooth(4).double())


NORM_WEIGHTS = ("norm1.weight", "norm2.weight")
