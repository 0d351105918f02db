"""What was found is trained on: the recipe that is written beside a family starts from all of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import detachnet
from detachnet.selection.adopting import adopting
from detachnet.surgery.enlarging import enlarged
from detachnet.training.recipe import load_recipe
from detachnet.training.start import build_family, start_from
from tests.runs import recipe

FOUND = {
    "macs60": detachnet.SubModel(drop=["features.9:features.12"], width={"features.0": 0.5}, filters="important"),
    "sub1": detachnet.SubModel(drop=[":features.23"]),  # one of those that there were
}


@pytest.mark.slow
@pytest.mark.parametrize("models", [(), ("base", "sub1")])
def test_a_recipe_for_what_was_found(tmp_path: Path, models: tuple[str, ...]) -> None:
    chosen = recipe(*([f"train.models={list(models)}"] if models else []))
    net = enlarged(build_family(chosen, (3, 32, 32)), {"macs60": FOUND["macs60"]})
    with torch.no_grad():
        for value in net.parameters():
            value.uniform_(0.1, 1)
    net.facts = net.facts.updated(trained=net.names)
    detachnet.save(net, tmp_path / "found.safetensors")
    front: Any = SimpleNamespace(models=FOUND, net=net)

    made = adopting(chosen, front, tmp_path / "found.safetensors")
    (tmp_path / "found.toml").write_text(made.to_toml())
    again = load_recipe(tmp_path / "found.toml")
    assert again == made
    assert again.models == net.names
    assert again.family.names == ("base", "sub0", "sub1", "macs60")
    started = build_family(again, (3, 32, 32))
    start_from(started, again.train.init)
    assert started.names == net.names
    for name, value in net.state_dict().items():
        assert torch.equal(value, started.state_dict()[name]), name


@pytest.mark.slow
def test_who_teaches_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    chosen = recipe("loss.distillation=1", 'loss.teacher="larger"')
    net = build_family(chosen, (3, 32, 32))
    assert adopting(chosen, SimpleNamespace(models={}, net=net), "f").loss.teacher == "larger"  # type: ignore[arg-type]
    net = enlarged(net, {"macs60": FOUND["macs60"]})  # larger than sub1, which is before it
    made = adopting(chosen, SimpleNamespace(models=FOUND, net=net), "f")  # type: ignore[arg-type]
    assert (made.loss.teacher, made.loss.distillation) == ("base", 1)
    assert "not in the order of their size" in caplog.text
    untaught = recipe("loss.distillation=0", 'loss.teacher="larger"')
    assert adopting(untaught, SimpleNamespace(models=FOUND, net=net), "f").loss == untaught.loss  # type: ignore[arg-type]
