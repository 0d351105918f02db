"""Run by test_processes.py under torchrun: one joint step through DDP against one process with the whole batch."""

import copy
import gc
import sys

import torch
from accelerate import Accelerator
from torch import nn

import detachnet

TOLERANCE = 1e-12


def main() -> None:
    accelerator = Accelerator(cpu=True)
    compare(accelerator)
    accelerator.free_memory()
    gc.collect()  # modules that were trained in it keep the group, whose threads may abort the process at its end
    accelerator.end_training()


def compare(accelerator: Accelerator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU()), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 4 * 4, 10)),
    ).double()
    net = detachnet.make_detachable(model, ["0", "1"], (3, 16, 16))
    alone = copy.deepcopy(net)
    images, target = torch.randn(8, 3, 16, 16, dtype=torch.double), torch.arange(8)
    loss = detachnet.MultiModelLoss({"sub1": 0.3}, distillation=1.0)
    wrapped = accelerator.prepare(net.train())
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    for _ in range(2):  # DDP complains in the second step about parameters without a gradient in the first
        wrapped.zero_grad()
        accelerator.backward(loss(wrapped(images[share], which="all"), target[share]))
    loss(alone.train()(images, which="all"), target).backward()
    for (name, one), other in zip(net.named_parameters(), alone.parameters(), strict=True):
        if one.grad is None or other.grad is None or not torch.allclose(one.grad, other.grad, 0, TOLERANCE):
            sys.exit(f"the gradients of {name} differ")
    print(f"process {accelerator.process_index} of {accelerator.num_processes}: equal")


if __name__ == "__main__":
    main()
