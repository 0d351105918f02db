"""Models by name: `torchvision:NAME`, `timm:NAME`, and the few detachnet brings along."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from detachnet.errors import DetachNetError, ModelError, nearest, one_line
from detachnet.models import NSN, AirbenchCifar, ResNetCifar, VGG16Cifar

logger = logging.getLogger("detachnet")
WEIGHTS = frozenset({"checkpoint_path", "pretrained", "weights"})
"""Arguments that give a model trained weights."""
FETCHING = WEIGHTS | {
    "cache_dir",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "weights_backbone",
}
"""Arguments by which a model's constructor reads or fetches a file, and those that say how. They are of no use to
build the model again: the weights are in the family's file."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from: enough to build it again without running anybody's code."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


_USERS = "detachnet_user_"
"""What the names of modules begin with that users' own files become."""
_OWN: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "vgg16_cifar": (VGG16Cifar, (3, 32, 32)),
    "resnet_cifar": (ResNetCifar, (3, 32, 32)),
    "airbench": (AirbenchCifar, (3, 32, 32)),
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
        name: `torchvision:NAME`, `timm:NAME`, where timm's tags may follow (`timm:resnet18.a1_in1k`), or
            `detachnet:NAME`.
        **kwargs: Passed to the library's own constructor: `num_classes=10`, `weights="DEFAULT"`
            (torchvision), `pretrained=True` (both) or `checkpoint_path="weights.safetensors"` (timm). With
            published weights and another number of classes the classifier stays new.

    Raises:
        ModelError: An unknown name, or arguments the model does not take.

    Examples:
        >>> model = detachnet.create_model("torchvision:vgg16_bn", num_classes=10)
    """
    if not isinstance(name, str):
        raise ModelError(f"create_model takes the name of a model, not {type(name).__name__}")
    library, _, short = name.partition(":")
    _check_name(name, library, short)
    build: Callable[..., nn.Module] = {
        "detachnet": partial(_own_model, short),
        "torchvision": partial(torchvision.models.get_model, short),
        "timm": partial(timm.create_model, short),
    }[library]
    if library == "torchvision" and "weights_backbone" in inspect.signature(_builder(short)).parameters:
        kwargs = {"weights_backbone": None} | kwargs  # torchvision would fetch them
    extra: dict[str, Any] = {}
    try:
        if library == "torchvision" and any(kwargs.get(key) for key in ("pretrained", "weights")):
            model, extra = _published(short, kwargs)
        else:
            model = build(**kwargs)
    except Exception as error:  # whatever the library's constructor raises
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"{name} cannot be built with {kwargs}", what=what) from error
    kept = extra | {key: value for key, value in kwargs.items() if key not in FETCHING}
    if library == "timm" and kwargs.get("pretrained"):
        _say_of_classifier(name, model)
    if kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay"):
        kept = _decided_by_cfg(model) | kept
    model.detachnet_source = ModelSource(name, kept)  # type: ignore[assignment]
    return model


def _check_name(name: str, library: str, short: str) -> None:
    """Refuse a name that no library has.

    Raises:
        ModelError: It is such.
    """
    if name in (known := list_models()):
        return
    plain, dot, _ = short.partition(".")
    if dot and library == "timm" and f"timm:{plain}" in known:
        tags = timm.list_pretrained(f"{plain}.*")
        if short in tags:
            return
        raise ModelError(
            f"timm has no weights {short!r} of {plain}",
            hint=f"timm:{plain} without pretrained weights, or one of its tags",
            nearest=[f"timm:{tag}" for tag in nearest(short, tags) or tags],
        )
    bare = name.removeprefix("hf_hub:").removeprefix("hf-hub:").removeprefix("timm/")
    plain = bare.partition(".")[0]
    meant = [
        full for lib, short in (("timm", plain), ("torchvision", bare)) if (full := f"{lib}:{short}") in known
    ]
    meant = [f"timm:{bare}" if full.startswith("timm:") else full for full in meant]
    same_library = [k for k in known if k.startswith(f"{library}:")] or known
    raise ModelError(
        f"unknown model {name!r}",
        hint=f"the function in it that makes the model: {name}:FUNCTION"
        if name.endswith(".py")
        else "a name is 'torchvision:NAME', 'timm:NAME', 'detachnet:NAME' or FILE.py:FUNCTION",
        nearest=meant or nearest(name, same_library) or nearest(name, known),
    )


def _published(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """torchvision's model with published weights, and the arguments that they decide.

    torchvision refuses another number of classes; here the classifier is left out of the weights, as timm does.
    """
    given = dict(kwargs)
    if given.pop("pretrained", False) and not given.get("weights"):
        given["weights"] = "DEFAULT"
    num_classes = given.pop("num_classes", None)
    whole = torchvision.models.get_model(name, **given)
    extra = {key: getattr(whole, key) for key in ("transform_input", "aux_logits") if hasattr(whole, key)}
    theirs = whole.state_dict()
    weights = given["weights"]
    known = torchvision.models.get_model_weights(name)
    outputs = len(
        (weights if isinstance(weights, known) else known[str(weights).rpartition(".")[2]]).meta["categories"]
    )
    if num_classes in (None, outputs):
        return whole, extra
    rest = {key: value for key, value in given.items() if key not in WEIGHTS} | extra
    model: nn.Module = torchvision.models.get_model(name, **rest, num_classes=num_classes)
    ours = model.state_dict()
    fits = {key: value for key, value in theirs.items() if key in ours and ours[key].shape == value.shape}
    new = sorted({key.rpartition(".")[0] for key in ours if key not in fits})
    model.load_state_dict(fits, strict=False)
    model.detachnet_new = tuple(new)  # type: ignore[assignment]
    logger.info(
        "torchvision:%s: %s new, for %s classes; the weights are of %s", name, _listed(new), num_classes, outputs
    )
    return model, extra


def _say_of_classifier(name: str, model: nn.Module) -> None:
    """Say that timm left the classifier out of the weights, where it did."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    outputs, ours = cfg.get("num_classes"), model.num_classes
    if outputs and outputs != ours:
        layers = cfg.get("classifier") or "the classifier"
        new = [layers] if isinstance(layers, str) else list(layers)
        model.detachnet_new = tuple(new)  # type: ignore[assignment]
        named = _listed(new)
        logger.info("%s: %s new, for %s classes; the weights are of %s", name, named, ours, outputs)


def new_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers that `create_model` left out of published weights."""
    layers: tuple[str, ...] = getattr(model, "detachnet_new", ())
    return layers


def _listed(layers: list[str]) -> str:
    """Layers in a sentence."""
    return f"{', '.join(map(repr, layers))} {'is' if len(layers) == 1 else 'are'}"


def is_own(name: str) -> bool:
    """Whether a model's name is `path/to/file.py:FUNCTION`."""
    return name.rpartition(":")[0].endswith(".py")


def build_model(name: str, folder: Path | None = None, **kwargs: Any) -> nn.Module:
    """`create_model`, or what a function of a user's own file returns; its code runs.

    Args:
        name: A name of the zoo, or `path/to/file.py:FUNCTION`.
        folder: Where a relative path is looked for, too.
        **kwargs: Arguments of the constructor or of the function.

    Raises:
        ModelError: As `create_model`; there is no such file or function, or it fails, or returns no model.
    """
    if not is_own(name):
        return create_model(name, **kwargs)
    text, _, function = name.rpartition(":")
    with _own_function(name, folder) as make:
        try:
            model = make(**kwargs)
        except TypeError as error:
            raise ModelError(f"{function} of {text} cannot be called with {kwargs}", what=str(error)) from error
        except DetachNetError:
            raise
        except Exception as error:  # whatever a user's function raises
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise ModelError(
                f"{function} of {text} fails",
                what=f"{type(error).__name__}: {one_line(error)}",
                where=f"{frame.filename}:{frame.lineno}: {frame.line}",
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{function} of {text} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _own_function(name: str, folder: Path | None) -> Iterator[Callable[..., Any]]:
    """A function of a user's own file, which may import what is beside it."""
    text, _, function = name.rpartition(":")
    places = dict.fromkeys([Path(text), *([folder / text] if folder else [])])
    found = [path for path in places if path.is_file()]
    if not found:
        looked = " and ".join(str(path.absolute()) for path in places)
        raise ModelError(f"there is no file {text}", what=f"looked for {looked}", hint="path/to/file.py:FUNCTION")
    with _importing_beside(found[0]):
        make = getattr(_module(found[0]), function, None)
        if not callable(make):
            raise ModelError(f"{text} has no function {function!r} that makes a model")
        yield make


def takes_num_classes(name: str, folder: Path | None = None) -> bool:
    """Whether a model can be told its number of classes: those of the zoo, and functions that have the argument.

    Raises:
        ModelError: As `build_model`.
    """
    if not is_own(name):
        return True
    with _own_function(name, folder) as make:
        return "num_classes" in inspect.signature(make).parameters


def own_files(model: nn.Module) -> dict[str, str]:
    """Name of each module that a user's own file has become, of those that a model's classes are of → the file."""
    names = {type(module).__module__ for module in model.modules()}
    return {name: str(sys.modules[name].__file__) for name in sorted(names) if name.startswith(_USERS)}


def import_own(files: Mapping[str, str]) -> None:
    """Run users' own files, as another process has, so that what is of their classes can be unpickled here.

    Raises:
        ModelError: One cannot be run.
    """
    for name, file in files.items():
        if name not in sys.modules:
            with _importing_beside(Path(file)):
                _module(Path(file))


def _module(path: Path) -> Any:
    """A file of Python, run."""
    spec = importlib.util.spec_from_file_location(f"{_USERS}{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        del sys.modules[spec.name]
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"{path} cannot be run", what=what) from error
    return module


@contextmanager
def _importing_beside(path: Path) -> Iterator[None]:
    """Whatever is beside a file can be imported inside, as when it is run."""
    sys.path.insert(0, folder := str(path.parent.resolve()))
    try:
        yield
    finally:
        sys.path.remove(folder)


def inferred_source(model: nn.Module) -> ModelSource | None:
    """Where a model that `timm.create_model` made came from, by its own account; None of any other."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not type(model).__module__.startswith("timm.models."):
        return None
    name, num_classes = f"timm:{cfg.get('architecture')}", getattr(model, "num_classes", None)
    if not isinstance(num_classes, int) or name not in list_models("timm"):
        return None
    first = next((p for p in model.parameters() if p.ndim == 4), None)
    in_chans = {} if first is None or first.shape[1] == cfg["input_size"][0] else {"in_chans": first.shape[1]}
    return ModelSource(name, {"num_classes": num_classes, **in_chans})


def _decided_by_cfg(model: nn.Module) -> dict[str, Any]:
    """The arguments whose defaults timm takes from a `pretrained_cfg`."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return {"num_classes": model.num_classes, "in_chans": cfg["input_size"][0]}


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


def normalization(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a model's published weights expect: timm's for it, else ImageNet's.

    Raises:
        ModelError: timm has the model, but not these weights of it.
    """
    library, _, name = model.partition(":")
    try:
        cfg = timm.models.get_pretrained_cfg(name) if library == "timm" else None
    except RuntimeError as error:
        raise ModelError(f"unknown model {model!r}", what=str(error)) from error
    return (tuple(cfg.mean), tuple(cfg.std)) if cfg else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
