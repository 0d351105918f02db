"""A small family with known figures."""

import torch

import detachnet
from detachnet.deploy.measurement import Measurement
from detachnet.deploy.profile import Profile
from detachnet.facts import DataInfo
from detachnet.machine import hardware

LATENCY_MS = {"base": 10.0, "sub0": 5.0, "sub1": 1.0}

ACCURACY = {"base": 0.9, "sub0": 0.8, "sub1": 0.6}

DATA = DataInfo(name="two", classes=("a", "b"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), num_test=100)


def profile_of(net: detachnet.DetachableNet, device: str = "cpu", threads: int = 1, **changes: object) -> Profile:
    """As if `detachnet profile` had measured `LATENCY_MS`, p99 twice that, and as many MB as milliseconds."""
    rows = tuple(
        Measurement(
            model=name,
            runtime="torch",
            device=device,
            batch=1,
            threads=threads,
            n=100,
            warmup=10,
            p50_s=0.8e-3 * ms,
            p90_s=1e-3 * ms,
            p99_s=2e-3 * ms,
            images_per_s=1e3 / ms,
            peak_memory_bytes=int(1e6 * ms),
            macs=net.plan[name].macs,
            num_params=1,
            num_bytes=4,
            accuracy=None,
        ).model_copy(update=changes)
        for name, ms in LATENCY_MS.items()
    )
    return Profile(rows=rows, hardware=hardware(torch.device("cpu")), versions={}, memory="told")


def make() -> detachnet.DetachableNet:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(model, ["features.6", "features.23"], check="none").eval()
    net.facts = net.facts.updated(accuracy=dict(ACCURACY), data=DATA)
    return net
