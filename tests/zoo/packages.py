"""What detachnet makes of networks from a dozen packages of the index, which it knows nothing of.

    pip install efficientnet-pytorch pytorchcv segmentation-models-pytorch transformers ultralytics monai kornia \
        open-clip-torch antialiased-cnns resnest facenet-pytorch peft
    python -m tests.zoo.packages [--write] [--only cuts] [PACKAGE[:NETWORK] ...]

Of each network three families are made, in float64: two cuts, a route that is chosen, and half the filters. Each
is compared with a copy of the network by the rules of `tests.same`, not by the library's, or refused in one
message. With `--write` the table `packages.csv` is written anew for what is named, all by default. Not for CI: the
packages fill an environment of their own. Nothing is fetched, all weights are random.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import detachnet
from tests.same import DRAWS, Rules, alone, compared, is_told, tensors

TABLE = Path(__file__).with_name("packages.csv")
FAMILIES: dict[str, dict[str, Any]] = {
    "cuts": {"cuts": [0.7, 0.35]},
    "route": {"sub_models": [0.6]},
    "width": {"cuts": {"half": detachnet.SubModel(width=0.5)}},
}
"""What is asked for."""
SMALL, MEDIUM = (3, 32, 32), (3, 64, 64)
Size = tuple[int, ...]
Networks = dict[str, tuple[Callable[[], nn.Module], Size]]


@dataclass(frozen=True)
class Row:
    """One network of the table."""

    package: str
    version: str
    network: str
    cuts: str = ""
    route: str = ""
    width: str = ""
    said: str = ""


def of(module: str, name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """Calls a function of a module that is imported then."""

    def make() -> nn.Module:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        made: nn.Module = found(*args, **kwargs)
        return made

    return make


def efficientnet_pytorch() -> Networks:
    names = ("efficientnet-b0", "efficientnet-b1")
    make = "EfficientNet.from_name"
    return {n: (of("efficientnet_pytorch", make, n, num_classes=10), SMALL) for n in names}


def pytorchcv() -> Networks:
    imagenet = (
        *("alexnet", "bn_vgg11", "bninception", "resnet18", "preresnet18", "resnext26_32x4d", "seresnet18"),
        *("sepreresnet18", "resnetd50b", "ibn_resnet50", "bam_resnet18", "cbam_resnet18", "airnet50_1x64d_r16"),
        *("pyramidnet101_a360", "diracnet18v2", "densenet121", "condensenet74_c4_g4", "peleenet", "wrn50_2"),
        *("hrnet_w18_small_v1", "vovnet27s", "selecsls42", "hardnet39ds", "dpn68", "darknet_tiny", "darknet53"),
        *("irevnet301", "bagnet9", "dla34", "dla46c", "fishnet99", "espnetv2_wd2", "hetnet", "scnet50"),
        *("squeezenet_v1_1", "squeezeresnet_v1_1", "sqnxt23_w1", "shufflenet_g1_wd4", "shufflenetv2_wd2"),
        *("shufflenetv2b_wd2", "menet108_8x1_g3", "mobilenet_wd4", "mobilenetb_wd4", "fdmobilenet_wd4"),
        *("mobilenetv2_wd4", "mobilenetv3_small_w7d20", "igcv3_wd4", "ghostnet", "mnasnet_small", "darts"),
        *("proxylessnas_cpu", "fbnet_cb", "xception", "inceptionv3", "inceptionv4", "inceptionresnetv2"),
        *("polynet", "nasnet_4a1056", "pnasnet5large", "spnasnet", "efficientnet_b0", "mixnet_s", "resneta10"),
        *("resnesta14", "regnetx002", "sknet50", "isqrtcovresnet18", "zfnet", "dicenet_wd5", "octresnet10_ad2"),
        *("lwopenpose2d_mobilenet_cmupan_coco",),
    )
    cifar = (
        *("nin_cifar10", "resnet20_cifar10", "preresnet20_cifar10", "resnext20_1x64d_cifar10", "rir_cifar10"),
        *(
            "sepreresnet20_cifar10",
            "pyramidnet110_a48_cifar10",
            "densenet40_k12_cifar10",
            "xdensenet40_2_k24_bc_cifar10",
        ),
        *("wrn16_10_cifar10", "wrn20_10_1bit_cifar10", "ror3_56_cifar10", "shakeshakeresnet20_2x16d_cifar10"),
        *("diaresnet20_cifar10", "diapreresnet20_cifar10", "resdropresnet20_cifar10", "msdnet22_cifar10"),
    )
    get = ("pytorchcv.model_provider", "get_model")
    large = {n: (of(*get, n), MEDIUM) for n in imagenet}
    return large | {n: (of(*get, n), (3, 32, 32)) for n in cifar}


def segmentation_models_pytorch() -> Networks:
    nets: Networks = {}
    for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus"):
        make = of("segmentation_models_pytorch", name, "resnet18", encoder_weights=None, classes=4)
        nets[f"{name} resnet18"] = (make, MEDIUM if name != "PAN" else (3, 128, 128))
    aux = {"aux_params": {"classes": 5, "dropout": 0.2}}
    make = of("segmentation_models_pytorch", "Unet", "mobilenet_v2", encoder_weights=None, classes=4, **aux)
    return nets | {"Unet mobilenet_v2 with classes": (make, MEDIUM)}


def transformers() -> Networks:
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "num_labels": 5}
    kinds: dict[str, tuple[dict[str, Any], Size]] = {
        "ResNet": (small | {"layer_type": "basic"}, SMALL),
        "RegNet": (small | {"groups_width": 8}, SMALL),
        "Bit": (small | {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 96, 128], "embedding_size": 32}, SMALL),
        "ConvNext": ({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_labels": 5}, SMALL),
        "ConvNextV2": ({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_labels": 5}, SMALL),
        "MobileNetV1": ({"depth_multiplier": 0.25, "num_labels": 5}, SMALL),
        "MobileNetV2": ({"depth_multiplier": 0.35, "num_labels": 5}, SMALL),
        "MobileViT": ({"image_size": 32, "num_labels": 5}, SMALL),
        "MobileViTV2": ({"image_size": 32, "num_labels": 5, "width_multiplier": 0.5}, SMALL),
        "EfficientNet": ({"width_coefficient": 0.5, "depth_coefficient": 0.5, "num_labels": 5}, SMALL),
        "PoolFormer": ({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_labels": 5}, SMALL),
        "Levit": ({"image_size": 32, "hidden_sizes": [32, 48, 64], "num_labels": 5}, SMALL),
        "Cvt": ({"embed_dim": [16, 48, 96], "depth": [1, 1, 2], "num_labels": 5}, SMALL),
        "FocalNet": ({"image_size": 32, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_labels": 5}, SMALL),
        "SwiftFormer": ({"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_labels": 5}, SMALL),
        "Swin": (
            {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "num_labels": 5},
            SMALL,
        ),
        "ViT": ({"image_size": 32, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}, SMALL),
    }

    def make(kind: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            package: Any = importlib.import_module("transformers")
            made: nn.Module = getattr(package, f"{kind}ForImageClassification")(
                getattr(package, f"{kind}Config")(**options)
            )
            return made

        return build

    return {f"{kind}ForImageClassification": (make(kind, o), size) for kind, (o, size) in kinds.items()}


def ultralytics() -> Networks:
    def make(config: str, inner: bool) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            tasks: Any = importlib.import_module("ultralytics.nn.tasks")
            model: Any = tasks.ClassificationModel(config, verbose=False)
            return model.model if inner else model  # type: ignore[no-any-return]

        return build

    names = ("yolov8n-cls.yaml", "yolo11n-cls.yaml", "yolov8n-cls-resnet50.yaml")
    return {f"{name}{' inside' * inner}": (make(name, inner), SMALL) for name in names for inner in (False, True)}


def monai() -> Networks:
    nets = "monai.networks.nets"
    plane: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3}
    strides = {"channels": (8, 16, 32), "strides": (2, 2)}
    return {
        "resnet18": (of(nets, "resnet18", spatial_dims=2, n_input_channels=3, num_classes=5), SMALL),
        "resnet18 3D": (
            of(nets, "resnet18", n_input_channels=1, num_classes=5, feed_forward=True),
            (1, 32, 32, 32),
        ),
        "DenseNet121": (of(nets, "DenseNet121", out_channels=5, **plane), SMALL),
        "SEResNet50": (of(nets, "SEResNet50", num_classes=5, **plane), SMALL),
        "EfficientNetBN": (of(nets, "EfficientNetBN", "efficientnet-b0", pretrained=False, num_classes=5), SMALL),
        "UNet": (of(nets, "UNet", out_channels=2, num_res_units=2, norm="BATCH", **strides, **plane), SMALL),
        "BasicUNet": (of(nets, "BasicUNet", out_channels=2, features=(8, 8, 16, 16, 32, 8), **plane), SMALL),
        "SegResNet": (of(nets, "SegResNet", out_channels=2, init_filters=8, dropout_prob=0.1, **plane), SMALL),
        "HighResNet": (of(nets, "HighResNet", out_channels=2, **plane), (3, 32, 32)),
        "AutoEncoder": (of(nets, "AutoEncoder", out_channels=3, **strides, **plane), SMALL),
        "Classifier": (
            of(nets, "Classifier", in_shape=(3, 32, 32), classes=5, channels=(8, 16, 32), strides=(2, 2, 2)),
            SMALL,
        ),
        "VNet": (of(nets, "VNet", out_channels=2, **plane), SMALL),
        "DynUNet": (
            of(
                nets,
                "DynUNet",
                out_channels=2,
                kernel_size=[3, 3, 3],
                strides=[1, 2, 2],
                upsample_kernel_size=[2, 2],
                deep_supervision=True,
                deep_supr_num=1,
                **plane,
            ),
            SMALL,
        ),
    }


def kornia() -> Networks:
    def behind(*layers: tuple[str, str, dict[str, Any]]) -> Callable[[], nn.Module]:
        """A ResNet-18 behind layers of kornia."""

        def build() -> nn.Module:
            front = [of(module, name, **options)() for module, name, options in layers]
            return nn.Sequential(*front, timm.create_model("resnet18", num_classes=5))

        return build

    mean = {"mean": torch.tensor([0.4, 0.5, 0.6]), "std": torch.tensor([0.2, 0.2, 0.3])}
    patch = (1, 32, 32)
    return {
        "HardNet": (of("kornia.feature", "HardNet", pretrained=False), patch),
        "HyNet": (of("kornia.feature", "HyNet", pretrained=False), patch),
        "SOSNet": (of("kornia.feature", "SOSNet", pretrained=False), patch),
        "TFeat": (of("kornia.feature", "TFeat", pretrained=False), patch),
        "KeyNet": (of("kornia.feature", "KeyNet", pretrained=False), (1, 48, 48)),
        "MobileViT": (of("kornia.contrib", "MobileViT", mode="xxs"), SMALL),
        "Normalize, resnet18": (behind(("kornia.enhance", "Normalize", mean)), SMALL),
        "augmentation.Normalize, resnet18": (behind(("kornia.augmentation", "Normalize", mean)), SMALL),
        "flips, resnet18": (behind(("kornia.augmentation", "RandomHorizontalFlip", {"p": 0.5})), SMALL),
        "ColorJitter, resnet18": (behind(("kornia.augmentation", "ColorJitter", {"hue": 0.1})), SMALL),
        "GaussianBlur2d, resnet18": (
            behind(("kornia.filters", "GaussianBlur2d", {"kernel_size": (3, 3), "sigma": (1.0, 1.0)})),
            SMALL,
        ),
        "rgb_to_grayscale, resnet18": (behind(("kornia.color", "RgbToHsv", {})), SMALL),
    }


def open_clip() -> Networks:
    def make(layers: tuple[int, ...], width: int) -> Callable[[], nn.Module]:
        return of("open_clip.modified_resnet", "ModifiedResNet", layers, 32, 4, 64, width)

    timm_tower = of("open_clip.timm_model", "TimmModel", "resnet18", 32, image_size=64)
    return {
        "ModifiedResNet": (make((1, 2, 1, 1), 16), MEDIUM),
        "ModifiedResNet deeper": (make((2, 2, 2, 2), 8), MEDIUM),
        "TimmModel resnet18": (timm_tower, MEDIUM),
    }


def antialiased_cnns() -> Networks:
    names = ("alexnet", "vgg11_bn", "resnet18", "resnet50", "densenet121", "mobilenet_v2", "resnext50_32x4d")
    return {n: (of("antialiased_cnns", n, pretrained=False), MEDIUM) for n in names}


def resnest() -> Networks:
    options = {"radix": 2, "groups": 1, "deep_stem": True, "stem_width": 16, "avg_down": True, "num_classes": 5}

    def small(**more: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            package: Any = importlib.import_module("resnest.torch.resnet")
            made: nn.Module = package.ResNet(
                package.Bottleneck, [1, 1, 1, 1], bottleneck_width=64, avd=True, **options, **more
            )
            return made

        return build

    return {
        "resnest50": (of("resnest.torch", "resnest50", pretrained=False), SMALL),
        "ResNet with split attention": (small(), SMALL),
        "with DropBlock and rectified convolutions": (small(dropblock_prob=0.1, final_drop=0.2), SMALL),
    }


def facenet_pytorch() -> Networks:
    face = of("facenet_pytorch", "InceptionResnetV1", classify=True, num_classes=5)
    return {
        "InceptionResnetV1 classify": (face, (3, 96, 96)),
        "InceptionResnetV1": (of("facenet_pytorch", "InceptionResnetV1"), (3, 96, 96)),
        "PNet": (of("facenet_pytorch.models.mtcnn", "PNet", pretrained=False), (3, 24, 24)),
        "RNet": (of("facenet_pytorch.models.mtcnn", "RNet", pretrained=False), (3, 24, 24)),
        "ONet": (of("facenet_pytorch.models.mtcnn", "ONet", pretrained=False), (3, 48, 48)),
    }


def peft() -> Networks:
    def adapted(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            package: Any = importlib.import_module("peft")
            model = timm.create_model(name, num_classes=5)
            made: nn.Module = package.get_peft_model(model, getattr(package, config)(**options))
            return made

        return build

    convolutions = {"target_modules": r".*layer\d\.\d\.conv1", "modules_to_save": ["fc"]}
    return {
        "LoRA resnet18": (adapted("resnet18", "LoraConfig", r=4, **convolutions), SMALL),
        "LoRA with dropout resnet18": (
            adapted("resnet18", "LoraConfig", r=4, lora_dropout=0.2, **convolutions),
            SMALL,
        ),
        "DoRA resnet18": (adapted("resnet18", "LoraConfig", r=4, use_dora=True, **convolutions), SMALL),
        "LoHa resnet18": (adapted("resnet18", "LoHaConfig", r=4, **convolutions), SMALL),
        "LoKr resnet18": (adapted("resnet18", "LoKrConfig", r=4, **convolutions), SMALL),
        "LoRA convnext_atto": (
            adapted(
                "convnext_atto", "LoraConfig", r=4, target_modules=r".*mlp\.fc\d", modules_to_save=["head.fc"]
            ),
            SMALL,
        ),
    }


PACKAGES: dict[str, Callable[[], Networks]] = {
    "efficientnet-pytorch": efficientnet_pytorch,
    "pytorchcv": pytorchcv,
    "segmentation-models-pytorch": segmentation_models_pytorch,
    "transformers": transformers,
    "ultralytics": ultralytics,
    "monai": monai,
    "kornia": kornia,
    "open-clip-torch": open_clip,
    "antialiased-cnns": antialiased_cnns,
    "resnest": resnest,
    "facenet-pytorch": facenet_pytorch,
    "peft": peft,
}


def check(package: str, network: str, make: Callable[[], nn.Module], size: Size, kinds: Iterable[str]) -> Row:
    """One row: what became of each family; of the others what the table says."""
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros would hide what is behind them
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    row = next((r for r in read() if (r.package, r.network) == (package, network)), None)
    row = replace(row or Row(package, "", network), version=version(package))
    known = row.said.split("; ") if {*kinds} < FAMILIES.keys() else []
    said = dict.fromkeys(line for line in known if line)
    for family in kinds:
        verdict, words = judge(model, size, FAMILIES[family])
        row = replace(row, **{family: verdict})
        said |= dict.fromkeys(line for word in words for line in word.split("; "))
    return replace(row, said="; ".join(said))


def judge(model: nn.Module, size: Size, asked: dict[str, Any]) -> tuple[str, list[str]]:
    """A word on a family, and what there is to say: equal, refused, told, or silent."""
    pristine = copy.deepcopy(model)
    try:
        net = detachnet.make_detachable(model, input_size=size, **asked)
    except detachnet.DetachNetError as error:
        return "refused", [f"{error.summary} ({error.what})" if getattr(error, "what", "") else error.summary]
    few = DRAWS if draws(pristine, size) else DRAWS[:1]
    rules = Rules(size, draws=few, images=4, modes=(True, False))  # norms over two single pixels amplify rounding
    difference = compared(pristine, net, rules)
    told = [*net.plan.hints, net.plan.checked, *(f"whole: {p} ({w})" for p, w in net.plan.whole.items())]
    if difference:
        verdict = "told" if is_told(difference, net.plan) else "silent"
        return verdict, [f"{difference} | {' | '.join(filter(None, told))}"]
    return "equal", [line for line in (net.plan.checked,) if line]


def draws(model: nn.Module, size: Size) -> bool:
    """Whether two training passes differ by random numbers."""
    outputs = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            run = copy.deepcopy(model).train()
            outputs.append(list(tensors(alone(run, torch.ones(2, *size, dtype=torch.double)))))
    return not all(map(torch.equal, *outputs))


def read() -> Iterator[Row]:
    """The rows of the table."""
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            yield from (Row(**row) for row in csv.DictReader(file))


def write(rows: list[Row]) -> None:
    """Write the table, in the order of the packages."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        order = list(PACKAGES)
        writer.writerows(map(asdict, sorted(rows, key=lambda row: order.index(row.package))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="PACKAGE[:NETWORK]", help="all by default")
    parser.add_argument("--only", action="append", choices=FAMILIES, help="one of the three families")
    parser.add_argument("--write", action="store_true", help="keep what became of them in the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    for wanted in options.wanted or PACKAGES:
        package, _, only = wanted.partition(":")
        for network, (make, size) in PACKAGES[package]().items():
            if only not in ("", network):
                continue
            try:
                row = check(package, network, make, size, options.only or FAMILIES)
            except Exception as error:  # the network itself cannot be made or run
                print(package, network, f"{type(error).__name__}: {error}".splitlines()[0][:300], flush=True)
                continue
            print(" | ".join(asdict(row).values())[:600], flush=True)
            if options.write:
                rest = [r for r in read() if (r.package, r.network) != (package, network)]
                write([*rest, row])


if __name__ == "__main__":
    main()
