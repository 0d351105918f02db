"""How long is make_detachable, and does it grow linearly with the number of nodes?

    python benchmarks/surgery.py [--quick] [--json FILE]

Seconds besides building the model, minimum of the repeats; one thread.
"""

from __future__ import annotations

import time
import warnings

import torch

import detachnet
from common import Row, arguments, begin, report
from detachnet.surgery.trace import trace

QUICK = ("torchvision:resnet18", "torchvision:resnet152", "torchvision:densenet201", "timm:efficientnetv2_l")
FULL = (
    *QUICK,
    "detachnet:vgg16_cifar",
    "torchvision:resnet50",
    "torchvision:densenet121",
    "torchvision:convnext_base",
    "timm:regnety_320",
    "timm:swin_base_patch4_window7_224",
    "timm:vit_base_patch16_224",
    "timm:maxvit_tiny_rw_224",
    "timm:tf_efficientnet_b8",
)


def measure(name: str, repeats: int) -> Row:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = detachnet.create_model(name)
    num_nodes = len(trace(model).eval.graph.nodes)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        detachnet.make_detachable(model, 2)
        seconds.append(time.perf_counter() - began)
    return {"model": name, "num_nodes": num_nodes, "seconds": min(seconds), "n": repeats}


def fit(rows: list[Row]) -> tuple[float, float, float]:
    """Least squares: seconds = a + b · nodes; a, b and the correlation."""
    nodes = torch.tensor([row["num_nodes"] for row in rows], dtype=torch.float64)
    seconds = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    design = torch.stack([torch.ones_like(nodes), nodes], 1)
    a, b = torch.linalg.lstsq(design, seconds).solution.tolist()
    return a, b, float(torch.corrcoef(torch.stack([nodes, seconds]))[0, 1])


def main() -> None:
    options = begin(arguments(__doc__, fixed=True))
    measure("torchvision:resnet18", 1)  # warm-up
    rows = [measure(name, 2 if options.quick else 5) for name in (QUICK if options.quick else FULL)]
    rows.sort(key=lambda row: row["num_nodes"])
    a, b, r = fit(rows)
    report(options, rows, fit={"a_s": a, "b_s_per_node": b, "correlation": r})
    print(f"seconds = {a:.3f} + {1000 * b:.3f} / 1000 nodes, correlation {r:.3f}")


if __name__ == "__main__":
    main()
