"""A family as ONNX graphs that share one file of weights; the model a budget allows, run by ONNX Runtime."""

import tempfile
from pathlib import Path

import torch

import detachnet

model = detachnet.create_model("detachnet:vgg16_cifar", width=0.25)
net = detachnet.make_detachable(model, ["features.6", "features.23"]).eval()
net.facts = detachnet.Facts(accuracy={"base": 0.85, "sub0": 0.84, "sub1": 0.65})  # as detachnet evaluate measured

with tempfile.TemporaryDirectory() as parent:
    folder = Path(parent) / "family"
    manifest = detachnet.export(net, folder)
    for entry in manifest.models:
        print(f"{entry.name}: {entry.macs / 1e6:.1f} M MACs, accuracy {entry.accuracy}")
    family = detachnet.Family.load(folder)
    chosen = family.choose(macs=10e6)
    answer = family.run(torch.randn(3, 32, 32), model=chosen)
    print(answer.model, tuple(answer.output.shape))
