"""What a family is made of is what the model's layers are like, whatever its first parameter is."""

import pytest
import torch
from torch import Tensor, nn

import detachnet
from tests.helpers import assert_joint_equals_separate

pytestmark = pytest.mark.slow

SIZE = (3, 16, 16)


class Net(nn.Module):
    def __init__(self, first: nn.Parameter) -> None:
        super().__init__()
        self.first = first
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.b, self.fc = nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16, 5)

    def middle(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.b(self.middle(self.a(x))).relu().mean((2, 3)))
        return logits


class Fourier(Net):
    def middle(self, h: Tensor) -> Tensor:
        low = torch.fft.rfft2(h)[..., :3, :3]
        return torch.fft.irfft2(torch.einsum("bixy,ioxy->boxy", low, self.first), s=(8, 8))


class Ordered(Net):
    def middle(self, h: Tensor) -> Tensor:
        return h[:, self.first]


class Gained(Net):
    def middle(self, h: Tensor) -> Tensor:
        return h * self.first.to(h.dtype)


NETS = {
    "complex": lambda: Fourier(nn.Parameter(torch.randn(8, 8, 3, 3, dtype=torch.cfloat))),
    "numbers": lambda: Ordered(nn.Parameter(torch.arange(8), requires_grad=False)),
    "double": lambda: Gained(nn.Parameter(torch.ones(8, 1, 1, dtype=torch.double))),
}


@pytest.mark.parametrize("name", NETS)
def test_the_first_parameter_decides_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    net = detachnet.make_detachable(model, ["a"], SIZE)
    assert "nothing was compared" not in net.plan.checked
    assert next(net.stepdowns.sub0.parameters()).dtype == torch.float32
    images = torch.randn(4, *SIZE)
    torch.testing.assert_close(net.eval()(images), model.eval()(images))
    joint = net(images, which="all")
    for each in net.names:
        torch.testing.assert_close(joint[each], net(images, which=each))
    if name == "numbers":
        assert_joint_equals_separate(net.double(), images.double())


def test_hooks_of_parameters_are_told() -> None:
    model = Net(nn.Parameter(torch.zeros(1)))
    model.b.weight.register_hook(lambda gradient: gradient * 0)
    model.fc.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    hints = detachnet.make_detachable(model, ["a"], SIZE).plan.hints
    said = "the family has not the hooks of the parameters 'b.weight', 'fc.bias': register them on net.base"
    assert said in hints


def test_a_batch_that_a_single_image_loses_is_told() -> None:
    class Squeezed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    hints = detachnet.make_detachable(Squeezed(nn.Parameter(torch.zeros(1))), ["a"], SIZE).plan.hints
    assert any("of a single image the model gives (5,), without the batch" in hint for hint in hints)


def test_decisions_by_a_dtype_inside_autocast_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Typed(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a(x))
            return self.fc((h if h.dtype == torch.bfloat16 else h * 2).relu().mean((2, 3)))  # type: ignore[no-any-return]

    net = detachnet.make_detachable(Typed(nn.Parameter(torch.zeros(1))), ["a"], SIZE).eval()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            net(torch.zeros(1, *SIZE))
    assert [m for m in caplog.messages if "autocast" in m] == [
        "Typed decides by a dtype: inside autocast its family may not"
    ]
