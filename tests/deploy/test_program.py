"""What torch.onnx.export is given."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from detachnet.deploy.formats import Piece
from detachnet.deploy.program import decompose, trace


class Net(nn.Module):
    """A convolution with a norm, and what follows."""

    def __init__(self, rest: Callable[[Tensor], Tensor], affine: bool = True) -> None:
        super().__init__()
        self.conv, self.norm, self.rest = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), rest

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.norm(self.conv(x)))


def program_of(module: nn.Module) -> torch.export.ExportedProgram:
    return trace(Piece("it", module.eval(), torch.randn(3, 3, 8, 8)), "onnx")


def names(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def residual(x: Tensor) -> Tensor:
    y = x.sigmoid()
    y += x
    return y.relu_().mean((2, 3))


def seen_later(x: Tensor) -> Tensor:
    y = x.sigmoid()
    y.relu_()
    return y.mean((2, 3))


def pooled(x: Tensor) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(nn.functional.hardswish(x, inplace=True), 1).flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize("rest", [residual, seen_later, pooled])
def test_common_networks_are_not_traced_again(rest: Callable[[Tensor], Tensor]) -> None:
    module = Net(rest)
    nn.init.uniform_(module.norm.running_mean)  # type: ignore[arg-type]
    program = decompose(program_of(module))
    assert program.run_decompositions({}) is program
    assert not [name for name in names(program) if "_." in name or "adaptive" in name or "aten.batch" in name]
    images = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(images), module(images))


def seen_through_a_view(x: Tensor) -> Tensor:
    y = x.sigmoid()
    flat = y.flatten(1)
    z = y.add_(1)
    return flat + z.flatten(1)


def two_pixels(x: Tensor) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(x, 2)


def unknown(x: Tensor) -> Tensor:
    return x.cumsum(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [Net(seen_through_a_view), Net(two_pixels), Net(unknown), Net(residual, affine=False)],
    ids=["view", "two", "unknown", "affine"],
)
def test_others_stay_as_they_are(module: nn.Module) -> None:
    program = program_of(module)
    before = names(program)
    assert decompose(program) is program
    assert names(program) == before
    assert program.run_decompositions({}) is not program
