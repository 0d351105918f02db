"""Batch norms of several models as one computation are the layers run one by one."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import detachnet
from detachnet.surgery.norms import _alike, norm_parts

SHAPES: dict[Callable[[int], nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (12, 4),
    nn.BatchNorm2d: (12, 4, 5, 3),
    nn.BatchNorm3d: (12, 4, 2, 3, 2),
}


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    """What was compiled for three layers would be taken for one that comes three times: torch does not look."""
    torch._dynamo.reset()


def layers(kind: Callable[[int], nn.Module], shared: bool) -> list[nn.Module]:
    """Three layers in training with weights that differ; or one, three times."""
    made = [kind(4).double() for _ in range(1 if shared else 3)]
    for norm in made:
        for tensor in [*norm.parameters(), norm.running_var]:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return made * 3 if shared else made


def propagated(
    run: Callable[..., torch.Tensor], norms: list[nn.Module], images: torch.Tensor, steps: int = 2
) -> list[torch.Tensor]:
    """Output, gradients and statistics after some steps."""
    x = images.clone().requires_grad_()
    for _ in range(steps):
        out = run(x, norms)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    tensors = [out, x.grad]
    for norm in norms:
        tensors += [*(parameter.grad for parameter in norm.parameters()), *norm.buffers()]
    return [tensor.detach() for tensor in tensors if tensor is not None]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_compiled_it_is_the_same(kind: Callable[[int], nn.Module], shared: bool) -> None:
    torch.manual_seed(0)
    norms, images = layers(kind, shared), torch.randn(SHAPES[kind], dtype=torch.double)
    compiled = torch.compile(norm_parts, backend="aot_eager", fullgraph=True)
    separate = propagated(norm_parts, copy.deepcopy(norms), images)
    together = propagated(compiled, copy.deepcopy(norms), images)
    assert len(separate) == len(together) > 2
    for one, other in zip(separate, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def count_norms(norms: list[nn.Module], x: torch.Tensor) -> int:
    """How many batch norms of torch's own are in the compiled graph."""
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(norm_parts, backend=look, fullgraph=True)(x, norms)
    return sum("batch_norm" in name for name in names)


@pytest.mark.slow
def test_only_what_is_alike_is_one_computation() -> None:
    x = torch.randn(12, 4, 5, 3)
    assert count_norms(layers_of_float(), x) == 0
    for change in ({"training": False}, {"momentum": 0.5}, {"eps": 1e-3}, {"affine": False}):
        norms = layers_of_float()
        for name, value in change.items():
            setattr(norms[1], name, value)
        assert count_norms(norms, x) == 3, change
    hooked = layers_of_float()
    hooked[2].register_forward_hook(lambda *_: None)
    assert count_norms(hooked, x) == 3


def test_an_average_over_all_batches_is_left_to_the_layer() -> None:
    assert not _alike([nn.BatchNorm2d(4, momentum=None)] * 3)


def layers_of_float() -> list[nn.Module]:
    return [norm.float() for norm in layers(nn.BatchNorm2d, shared=False)]


def test_half_precision_keeps_its_type_and_float_statistics() -> None:
    torch.manual_seed(0)
    norms, x = layers_of_float(), torch.randn(12, 4, 5, 3).bfloat16()
    out = torch.compile(norm_parts, backend="aot_eager", fullgraph=True)(x, copy.deepcopy(norms))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, norm_parts(x, norms), rtol=1e-2, atol=1e-2)


def test_one_value_is_refused_as_by_a_batch_norm() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_parts(torch.randn(3, 4), [norm.float() for norm in layers(nn.BatchNorm1d, shared=False)])


def test_a_norm_of_other_channels_is_refused_in_torchs_words() -> None:
    """Shapes of norms are not worked out where they are clear, which they are not here."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(detachnet.TraceError, match="does not run on 3×8×8 images: it fails at '1'"):
        detachnet.make_detachable(model, ["2"], (3, 8, 8), check="none")
