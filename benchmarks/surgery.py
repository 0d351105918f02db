"""How long is make_detachable, and does it grow linearly with the number of nodes?

    python benchmarks/surgery.py [--quick] [--json FILE]

Seconds besides building the model, minimum of the repeats; one thread.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from pathlib import Path

import timm
import torch
import torchvision

import detachnet
from detachnet.trace import trace

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


def measure(name: str, repeats: int) -> dict[str, object]:
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


def fit(rows: list[dict[str, object]]) -> tuple[float, float, float]:
    """Least squares: seconds = a + b · nodes; a, b and the correlation."""
    nodes = torch.tensor([row["num_nodes"] for row in rows], dtype=torch.float64)
    seconds = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    design = torch.stack([torch.ones_like(nodes), nodes], 1)
    a, b = torch.linalg.lstsq(design, seconds).solution.tolist()
    return a, b, float(torch.corrcoef(torch.stack([nodes, seconds]))[0, 1])


def main() -> None:
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv
    measure("torchvision:resnet18", 1)  # warm-up
    rows = [measure(name, 2 if quick else 5) for name in (QUICK if quick else FULL)]
    rows.sort(key=lambda row: int(str(row["num_nodes"])))
    print(f"{'model':<36} {'nodes':>6} {'seconds':>8}")
    for row in rows:
        print(f"{row['model']:<36} {row['num_nodes']:>6} {row['seconds']:>8.3f}")
    a, b, r = fit(rows)
    print(f"seconds = {a:.3f} + {1000 * b:.3f} / 1000 nodes, correlation {r:.3f}")
    if "--json" in sys.argv:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
        machine = {"machine": platform.machine(), "python": platform.python_version(), "threads": 1}
        result = {"rows": rows, "fit": {"a_s": a, "b_s_per_node": b, "correlation": r}, **versions, **machine}
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
