"""A network of one's own: where it can be cut, a family of it, and a file that comes back."""

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import detachnet


class Small(nn.Module):
    """Three stages of convolutions and a linear layer."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        chs = (3, 16, 32, 64)
        self.stages = nn.Sequential(*(self.stage(a, b) for a, b in pairwise(chs)))
        self.fc = nn.Linear(chs[-1], num_classes)

    @staticmethod
    def stage(in_chs: int, out_chs: int) -> nn.Sequential:
        """Convolution, norm, activation, pooling."""
        conv = nn.Conv2d(in_chs, out_chs, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(out_chs), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)`."""
        return self.fc(self.stages(x).mean((2, 3)))


for point in detachnet.find_cuts(Small(), (3, 32, 32)):
    if point.place == "activation":
        print(f"{point.name}: {point.shape}, {100 * point.macs_of_base:.0f} % of the MACs")
net = detachnet.make_detachable(Small(), ["stages.0", "stages.1"], (3, 32, 32)).eval()
with tempfile.TemporaryDirectory() as folder:
    detachnet.save(net, path := Path(folder) / "family.safetensors")
    again = detachnet.load(path, model=Small())
images = torch.randn(2, 3, 32, 32)
print(all(torch.equal(again(images, which=name), net(images, which=name)) for name in net.names))
