"""Models by name: `torchvision:NAME`, `timm:NAME`, and the few detachnet brings along."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import cfgs as vgg_cfgs
from torchvision.models.vgg import make_layers

from detachnet.errors import ModelError, nearest


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from: enough to build it again without running anybody's code."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


class VGG16Cifar(nn.Module):
    """VGG-16 for 32×32 images, as the paper trains it.

    Batch norm after every weight layer but the last; the first two fully connected layers are removed and
    the last one is 512 → `num_classes`. The layers are torchvision's, so `features.6` and `features.23` are
    the first and the third pooling layer, the paper's two cuts.

    Args:
        num_classes: Size of the output, `(B, num_classes)`.
        width: Multiplies every number of channels.

    Source: Fuengfusin & Tamukoh, JRNAL 8(1), 2021, section 3; initialized as torchvision's VGG.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        cfg = [v if isinstance(v, str) else max(1, round(v * width)) for v in vgg_cfgs["D"]]
        num_chs = [v for v in cfg if isinstance(v, int)]
        self.features = make_layers(cfg, batch_norm=True)
        self.classifier = nn.Linear(num_chs[-1], num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.constant_(module.bias, 0)  # type: ignore[arg-type]
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, 32, 32)`."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class ResNetCifar(nn.Module):
    """A residual network for 32×32 images: three stages of basic blocks with 16, 32 and 64 channels.

    `layer1` and `layer2` are the places to cut. The blocks are torchvision's; where a stage changes the size, the
    shortcut is a 1×1 convolution.

    Args:
        num_classes: Size of the output, `(B, num_classes)`.
        depth: Number of weight layers, 6n + 2: 20, 32, 44, 56, ….
        width: Multiplies every number of channels.

    Raises:
        ValueError: `depth` is not 6n + 2.

    Source: He et al., arXiv 1512.03385, section 4.2, with its shortcuts of option B.
    """

    def __init__(self, num_classes: int = 10, depth: int = 20, width: float = 1.0) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is 6n + 2, such as 20 or 56, not {depth}")
        small, middle, large = (max(1, round(n * width)) for n in (16, 32, 64))
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, small, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(small)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(small, small, count, stride=1)
        self.layer2 = _stage(small, middle, count, stride=2)
        self.layer3 = _stage(middle, large, count, stride=2)
        self.fc = nn.Linear(large, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, 32, 32)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(in_chs: int, out_chs: int, count: int, stride: int) -> nn.Sequential:
    """`count` basic blocks, the first of which changes the size and the number of channels."""
    shortcut = None
    if stride != 1 or in_chs != out_chs:
        shortcut = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))
    blocks = [BasicBlock(in_chs, out_chs, stride, shortcut)]
    return nn.Sequential(*blocks, *(BasicBlock(out_chs, out_chs) for _ in range(count - 1)))


class NSN(nn.Module):
    """An MLP whose hidden layers are as wide as the image has pixels, so that each can take in the image itself.

    784-784-784-10 by default: `hidden.0` and `hidden.1` are the places to cut, with `stepdown="identity"`.

    Args:
        num_classes: Size of the output, `(B, num_classes)`.
        depth: Number of hidden layers.
        dropout: Probability behind each hidden layer.

    Source: Fuengfusin & Tamukoh, "Network with Sub-Networks", arXiv 1908.00763.
    """

    def __init__(self, num_classes: int = 10, depth: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(784, 784), nn.ReLU(), nn.Dropout(dropout)) for _ in range(depth)]
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(784, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 1, 28, 28)`."""
        logits: Tensor = self.head(self.hidden(x.flatten(1)))
        return logits


_OWN: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "vgg16_cifar": (VGG16Cifar, (3, 32, 32)),
    "resnet_cifar": (ResNetCifar, (3, 32, 32)),
    "nsn": (NSN, (1, 28, 28)),
}


def list_models(library: str | None = None) -> list[str]:
    """Every name `create_model` knows, with its prefix; of one `library` if given."""
    names = {
        "detachnet": list(_OWN),
        "torchvision": torchvision.models.list_models(),
        "timm": timm.list_models(),
    }
    return [f"{lib}:{name}" for lib in names if library in (None, lib) for name in names[lib]]


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a model of the zoo.

    A family made from such a model is saved with the name and the arguments, so its file loads without any
    code of the user's.

    Args:
        name: `torchvision:NAME`, `timm:NAME` or `detachnet:NAME`.
        **kwargs: Passed to the library's own constructor: `num_classes=10`, `weights="DEFAULT"`
            (torchvision), `pretrained=True` (timm).

    Raises:
        ModelError: An unknown name, or arguments the model does not take.

    Examples:
        >>> model = detachnet.create_model("torchvision:vgg16_bn", num_classes=10)
    """
    library, _, short = name.partition(":")
    if name not in (known := list_models()):
        same_library = [k for k in known if k.startswith(f"{library}:")] or known
        raise ModelError(
            f"unknown model {name!r}",
            hint="a name is 'torchvision:NAME', 'timm:NAME' or 'detachnet:NAME'",
            nearest=nearest(name, same_library) or nearest(name, known),
        )
    build: Callable[..., nn.Module] = {
        "detachnet": partial(_own_model, short),
        "torchvision": partial(torchvision.models.get_model, short),
        "timm": partial(timm.create_model, short),
    }[library]
    if library == "torchvision" and "weights_backbone" in inspect.signature(_builder(short)).parameters:
        kwargs = {"weights_backbone": None} | kwargs  # torchvision would fetch them
    try:
        model = build(**kwargs)
    except Exception as error:  # whatever the library's constructor raises
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"{name} cannot be built with {kwargs}", what=what) from error
    # Weights are in the checkpoint; loading a family must not fetch them a second time.
    kept = {k: v for k, v in kwargs.items() if k not in ("weights", "weights_backbone", "pretrained")}
    model.detachnet_source = ModelSource(name, kept)  # type: ignore[assignment]
    return model


def _builder(name: str) -> Callable[..., nn.Module]:
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    return builder


def _own_model(name: str, **kwargs: Any) -> nn.Module:
    return _OWN[name][0](**kwargs)


def model_source(model: nn.Module) -> ModelSource | None:
    """The name and arguments `create_model` built `model` from; None for a user's own."""
    source = getattr(model, "detachnet_source", None)
    return source if isinstance(source, ModelSource) else None


def default_input_size(model: nn.Module) -> tuple[int, ...] | None:
    """The image size `(C, H, W)` the model declares, or None if it declares none.

    Source: detachnet's own table, timm's `pretrained_cfg`, torchvision's usual 224 (299 for Inception v3).
    """
    source = model_source(model)
    if source and source.name.startswith("detachnet:"):
        return _OWN[source.name.partition(":")[2]][1]
    declared = getattr(model, "pretrained_cfg", None)
    if isinstance(declared, dict) and declared.get("input_size"):
        return tuple(declared["input_size"])
    module = inspect.getmodule(type(model))
    if module is not None and module.__name__.startswith("torchvision.models."):
        if module.__name__.startswith("torchvision.models.video"):
            return (3, 16, 112, 112) if module.__name__.endswith("resnet") else (3, 16, 224, 224)
        side = 299 if isinstance(model, torchvision.models.Inception3) else 224
        return (3, side, side)
    return None
