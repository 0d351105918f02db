"""Seconds of each segment: one for each place, added up to the whole."""

import pytest
import torch
import torchvision

import detachnet
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.spans import span_places
from detachnet.surgery.trace import trace


@pytest.mark.slow
def test_every_place_is_timed_and_the_model_left_alone() -> None:
    model = torchvision.models.resnet18(num_classes=5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    seconds = detachnet.measure_segments(model, (3, 32, 32), n=3, warmup=1)
    assert torch.equal(torch.get_rng_state(), random)
    traced = trace(model, (3, 32, 32))
    assert list(seconds) == [*(traced.eval.name_of[n] for n in span_places(CutAnalysis(traced.eval))), ""]
    assert all(value > 0 for value in seconds.values())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    plan = detachnet.make_detachable(
        model, input_size=(3, 32, 32), sub_models=[0.8], costs=seconds, check="none"
    ).plan
    assert plan.models[1].spans


@pytest.mark.slow
def test_a_slow_layer_is_a_slow_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torchvision.models.resnet18(num_classes=5)
    now = [0.0]
    monkeypatch.setattr("detachnet.deploy.segments.now", lambda device: now[0])
    original = torch.nn.Conv2d.forward

    def forward(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        now[0] += 1.0 if self.out_channels == 256 else 0.0
        return original(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    seconds = detachnet.measure_segments(model, (3, 32, 32), n=2, warmup=0)
    assert {name: value for name, value in seconds.items() if value} == {"layer3.0": 3.0, "layer3": 2.0}


@pytest.mark.parametrize(
    ("options", "message"), [({"batch": 0}, "batch=0"), ({"n": 0}, "n=0"), ({"warmup": -1}, "-1")]
)
def test_refusals(options: dict[str, int], message: str) -> None:
    with pytest.raises(detachnet.MeasurementError, match=message):
        detachnet.measure_segments(torchvision.models.resnet18(), (3, 32, 32), **options)
