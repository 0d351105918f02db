"""What is made of a recipe's tables, beside torch's own optimizers and rates by hand."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from detachnet.training.optimizer import AveragedWeights, make_loss, make_optimizer, make_schedule
from detachnet.training.state import fuses
from tests.runs import recipe

Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.6, weight_decay=0.2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.3, momentum=0.6, weight_decay=0.2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.3, weight_decay=0.2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("alone", [False, True])
def test_an_optimizer_is_torchs(name: str, alone: bool) -> None:
    decays = (
        ("optimizer.weight_decay=0.9", 'train.models=["sub1"]', "optimizer.weight_decay_alone={sub1=0.2}")
        if alone
        else ("optimizer.weight_decay=0.2", "optimizer.weight_decay_alone={sub1=0.9}")
    )
    chosen = recipe(f"optimizer.name={name}", "optimizer.lr=0.3", "optimizer.momentum=0.6", *decays)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        make_optimizer(chosen, ours, list(ours.parameters()), fused=False),
        OPTIMIZERS[name](theirs.parameters()),
    )
    for _ in range(4):
        images = torch.randn(5, 3)
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            layer(images).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_biases_of_norms_have_a_rate_of_their_own_and_decay_as_the_others(name: str) -> None:
    """`OPTIMIZERS` has torch's for the rest; the batch norm's factor is frozen, as in a network of ours."""
    chosen = recipe(
        *(f"optimizer.{key}" for key in (f"name={name}", "lr=0.3", "momentum=0.6", "weight_decay=0.2")),
        "optimizer.norm_bias_lr=4",
    )
    ours, theirs = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4, bias=False), nn.GroupNorm(2, 4))
        for _ in range(2)
    )
    ours[1].weight.requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    trained = [p for p in ours.parameters() if p.requires_grad]
    biases = [theirs[1].bias, theirs[3].bias]
    others = [p for n, p in theirs.named_parameters() if n not in ("1.weight", "1.bias", "3.bias")]
    optimizer = make_optimizer(chosen, ours, trained, fused=False)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]
    assert optimizer.param_groups[0]["lr"] == 0.3
    quick = OPTIMIZERS[name](iter(biases))
    quick.param_groups[0] |= {"lr": 1.2, "weight_decay": 0.05}
    optimizers: dict[nn.Module, list[torch.optim.Optimizer]] = {
        ours: [optimizer],
        theirs: [quick, OPTIMIZERS[name](iter(others))],
    }
    for _ in range(4):
        images = torch.randn(5, 3)
        for layers, steps in optimizers.items():
            layers.zero_grad()
            layers(images).sub(1).square().mean().backward()
            for one in steps:
                one.step()
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def rates(*overrides: str) -> list[float]:
    """Of every update of four epochs of five steps."""
    chosen = recipe("train.epochs=4", "optimizer.lr=0.6", *overrides)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.6)
    schedule = make_schedule(chosen, optimizer, 5)
    found = []
    for number in range(20):
        schedule.step_update(number)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_half_a_wave_behind_the_warm_up() -> None:
    warm = [0.6 * i / 6 for i in range(6)]  # 1.2 epochs
    wave = [0.3 * (1 + math.cos(math.pi * i / 14)) for i in range(14)]
    assert rates("schedule.name=cosine", "schedule.warmup_epochs=1.2") == pytest.approx(warm + wave)
    whole = [0.3 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    assert rates("schedule.name=cosine", "schedule.warmup_epochs=0") == pytest.approx(whole)


def test_a_warm_up_to_the_end(caplog: pytest.LogCaptureFixture) -> None:
    up = [0.6 * i / 20 for i in range(20)]
    assert rates("schedule.name=cosine", "schedule.warmup_epochs=4") == pytest.approx(up)
    assert not caplog.records  # timm warns of a cosine of one step


def test_a_triangle() -> None:
    up, down = [0.6 * i / 6 for i in range(6)], [0.6 * (1 - i / 14) for i in range(14)]
    assert rates("schedule.name=linear", "schedule.warmup_epochs=1.2") == pytest.approx(up + down)


def test_steps_down_after_the_milestones() -> None:
    table = 'schedule={name="multistep", milestones=[2, 3], decay=0.2, warmup_epochs=0.8}'
    warm = [0.6 * i / 4 for i in range(4)]
    assert rates(table) == pytest.approx([*warm, *[0.6] * 6, *[0.12] * 5, *[0.024] * 5])


def test_every_term_of_the_loss_is_the_recipes() -> None:
    terms = {"label_smoothing": 0.1, "distillation": 0.7, "temperature": 3.0, "teacher": "larger", "hint": 0.25}
    loss = make_loss(recipe("loss.weights={sub1=0.3}", *(f"loss.{key}={value}" for key, value in terms.items())))
    assert {key: getattr(loss, key) for key in terms} == terms
    assert loss.weights == {"sub1": 0.3}


def test_an_average_has_the_counts_of_its_norms() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = AveragedWeights(net, 0.5)
    before = copy.deepcopy(dict(net.named_parameters()) | dict(net.named_buffers()))
    for parameter in net.parameters():
        parameter.data += 1
    net(torch.randn(4, 3))
    average.update(net, 2)  # the first one copies
    for name, tensor in average.module.state_dict().items():
        now: Tensor = net.state_dict()[name]
        expected = 0.5 * before[name] + 0.5 * now if tensor.is_floating_point() else now
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("sample", [0, 1])
def test_updates_are_fused_where_a_step_trains_all(sample: int) -> None:
    assert fuses(recipe(f"train.sample={sample}"), torch.device("cuda")) == (not sample)
    assert not fuses(recipe(f"train.sample={sample}"), torch.device("cpu"))
