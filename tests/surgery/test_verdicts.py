"""What is known of nodes that join the images of a batch, without building anything."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detachnet.surgery.coupling import Coupling, Verdict, layer_verdict
from detachnet.surgery.trace import trace


class Ops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = F.instance_norm(x)
        x = x - x.mean(0, keepdim=True)
        return torch.softmax(x.mean((2, 3)), 1)


@pytest.mark.parametrize("training", [True, False])
def test_verdicts_of_a_graph(training: bool) -> None:
    traced = trace(Ops(), (3, 8, 8))
    graph = traced.train if training else traced.eval
    coupling = Coupling(graph, training)
    found = {graph.name_of.get(node, node.op): coupling.verdict(node).how for node in graph.live}
    norm = "per model" if training else "once"
    assert found == {
        "placeholder": "once",
        "conv": "once",
        "norm": norm,
        "instance_norm": "per model",
        "mean": "once",  # to be found by running it
        "sub": "once",
        "mean_1": "once",
        "base": "once",  # the softmax
        "output": "once",
    }


def test_verdicts_of_layers() -> None:
    assert layer_verdict(nn.Dropout(), True).how == "once"
    assert layer_verdict(nn.BatchNorm1d(2), False).how == "once"
    assert layer_verdict(nn.BatchNorm1d(2, track_running_stats=False), False).how == "per model"
    assert layer_verdict(nn.InstanceNorm2d(2, track_running_stats=True), True).how == "per model"
    assert layer_verdict(nn.InstanceNorm2d(2), True).how == "once"
    assert layer_verdict(Ops(), False).why == "is a layer of the user's own, kept whole"


def test_what_running_found_counts_first() -> None:
    graph = trace(Ops(), (3, 8, 8)).eval
    node = next(n for n in graph.live if graph.name_of.get(n) == "mean")
    assert Coupling(graph, False, {node: Verdict("per model", "…")}).verdict(node).how == "per model"
