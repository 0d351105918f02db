"""How long is make_detachable, and does it grow linearly with the number of nodes?

    python benchmarks/surgery.py [--quick] [--json FILE]

Seconds besides building the model, minimum of the repeats; one thread. For some models, with weights, also the
median seconds without and with the comparison of the family with the model, in turn.
"""

from __future__ import annotations

import time
import warnings
from functools import partial

import torch

import detachnet
from common import Row, arguments, begin, report, table, time_in_turn
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
PROVED = ("torchvision:resnet18", "torchvision:mobilenet_v3_large", "torchvision:resnet152")


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


def measure_proof(name: str, rounds: int) -> Row:
    """Seconds with weights, without the proof and with it."""
    model = detachnet.create_model(name)
    timing = time_in_turn(
        {check: partial(detachnet.make_detachable, model, 2, check=check) for check in ("none", "full")},
        torch.device("cpu"),
        seconds=0,
        least=rounds,
    )
    without, proved = (timing.median_ms(check) / 1e3 for check in ("none", "full"))
    return {"model": name, "without_proof_s": without, "with_proof_s": proved, "n": timing.n}


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
    proofs = [measure_proof(name, 3 if options.quick else 7) for name in (PROVED[:1] if options.quick else PROVED)]
    report(options, rows, proofs=proofs, fit={"a_s": a, "b_s_per_node": b, "correlation": r})
    print("\n".join(table(proofs)))
    print(f"seconds = {a:.3f} + {1000 * b:.3f} / 1000 nodes, correlation {r:.3f}")


if __name__ == "__main__":
    main()
