"""What a file or a call asks for out of proportion is refused before memory is taken for it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load as from_bytes
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import detachnet
from detachnet.checkpoint import content as checkpoint
from detachnet.memory import Bounded, TooMuchError
from detachnet.storage import read_file
from detachnet.surgery import graph, statistics
from detachnet.surgery.widths.storing import _bits
from tests import models


def header(count: int, length: int | None = None) -> bytes:
    """A safetensors file of so many empty tensors, whose header is said to have `length` bytes."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"t{i}":{entry}' for i in range(count)) + "}").encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.slow
def test_many_tensors_are_refused_before_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(from_bytes(header(1000))) == 1000  # safetensors itself reads such files
    path = tmp_path / "f.safetensors"
    path.write_bytes(header(300_000))
    monkeypatch.setattr(checkpoint, "from_bytes", lambda content: pytest.fail("they are made"))
    with pytest.raises(detachnet.CheckpointError, match=r"what +its header names 300000 tensors"):
        detachnet.load(path)
    path.write_bytes(header(10, 1 << 62))
    with pytest.raises(detachnet.CheckpointError, match=r"its header is said to have 4611686018427387904 bytes"):
        detachnet.load(path)


@pytest.mark.parametrize("text", [b"[]", b"1", b"null", b'"a"', b"[" * 5000])
def test_a_header_that_is_no_table(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(detachnet.CheckpointError, match="is not a complete safetensors file"):
        detachnet.load(path)


class Holes:
    """A file of more bytes than there is memory for."""

    def __enter__(self) -> "Holes":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> bytes:
        raise MemoryError


def test_a_file_that_is_larger_than_memory_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detachnet.storage.open_file", lambda path: Holes())
    with pytest.raises(OSError, match="Cannot allocate memory"):
        read_file(tmp_path / "f")
    with pytest.raises(detachnet.CheckpointError, match="Cannot allocate memory"):
        detachnet.load(tmp_path / "f.safetensors")
    with pytest.raises(detachnet.RecipeError, match="Cannot allocate memory"):
        detachnet.load_recipe("quickstart")


def test_an_image_that_does_not_fit_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven of these are 2.3 GB."""
    monkeypatch.setattr(graph._Propagator, "_run_on_zeros", lambda *_: pytest.fail("it is run with memory"))
    with pytest.raises(
        detachnet.TraceError, match="Plain does not run on 375×375×375 images: it fails at 'conv1'"
    ):
        detachnet.make_detachable(models.Plain(), ["pool"], (375, 375, 375), check="none")


class ByValue(nn.Module):
    """A layer of the user's own that decides by its input's values; a convolution behind it."""

    class Clip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(max=x.max().item())

    def __init__(self) -> None:
        super().__init__()
        self.clip = self.Clip()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(self.clip(x))).mean((2, 3))


def test_what_needs_values_gets_them_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LARGE_BYTES", 0)
    net = detachnet.make_detachable(ByValue(), ["conv1"], (3, 8, 8)).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(images), net.base(images))


class Moving(nn.Module):
    """Keeps a mean of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not x.is_meta:
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3)).detach()
        return x - self.mean[:, None, None]


def test_statistics_are_found_with_two_images() -> None:
    seen = list[int]()

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, Moving) and module.training and not given[0].is_meta:
            seen.append(len(given[0]))

    model = nn.Sequential(Moving(), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with register_module_forward_pre_hook(note):  # what a forward pass itself notes outside is put back
        net = detachnet.make_detachable(
            model, {"small": detachnet.SubModel(drop=["1:2"])}, (3, 8, 8), check="none"
        )
    assert net._statistics == {"0": ("",)}
    assert seen == [statistics.IMAGES] * 2 * statistics.PASSES


def test_a_model_for_many_images_keeps_its_statistics() -> None:
    class Groups(Moving):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 5:
                raise RuntimeError("too few")
            return super().forward(x)

    model = nn.Sequential(Groups(), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = detachnet.make_detachable(model, {"small": detachnet.SubModel(drop=["1:2"])}, (3, 8, 8), check="none")
    assert net._statistics == {"0": ("",)}


def test_a_tensor_like_another_counts_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.empty(10**13, device="meta")
    for make in (torch.zeros_like, torch.empty_like, torch.rand_like):
        with pytest.raises(TooMuchError), Bounded(10**6, 10):
            make(large, device="cpu")
    with Bounded(10**6, 10):
        assert torch.zeros_like(large).is_meta
        assert torch.zeros_like(torch.ones(10)).sum() == 0


@pytest.mark.parametrize("units", [10**18, 9, 0, -1, "1ff", "0", "-1", "f" * 10_000, "zz"])
def test_a_stored_width_of_more_filters_than_there_are(units: int | str) -> None:
    """A number of bits is compared with them before there are so many."""
    with pytest.raises(detachnet.WidthError, match=r"a stored width keeps .* of 'conv', which has 8"):
        _bits("conv", units, 8)
    assert _bits("conv", 8, 8).all()
    assert _bits("conv", 3, 8).tolist() == [True] * 3 + [False] * 5
    assert _bits("conv", "81", 8).tolist() == [True, *[False] * 6, True]
