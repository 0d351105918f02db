"""The checked-in table of every model; a few of them are tried here, all by `make zoo`."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import timm
import torch
import torchvision

import detachnet
from detachnet.zoo import build_model, model_source, new_layers
from tests.zoo.check import (
    TABLE_OF,
    alone,
    check,
    compare,
    every_name,
    family_of,
    in_processes,
    page,
    read_table,
    sample,
)

TABLE = {row.name: row for row in read_table()}
SAMPLE = [
    "timm:resnet18",
    "torchvision:mobilenet_v3_small",
    "timm:test_vit",
    "torchvision:fasterrcnn_resnet50_fpn",
]


def working(names: list[str]) -> float:
    rows = [TABLE[name] for name in names]
    return sum(bool(row.cuts) and row.cuts != "0" and not row.refusal for row in rows) / len(rows)


of_this_timm = pytest.mark.skipif(timm.__version__ != TABLE_OF, reason=f"the table is of timm {TABLE_OF}")


@of_this_timm
def test_the_table_has_every_name() -> None:
    assert set(TABLE) == set(every_name())


@pytest.mark.slow
@of_this_timm
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_table(name: str) -> None:
    row, known = check(name), TABLE[name]
    assert (row.cuts, row.refusal) == (known.cuts, known.refusal)


def test_samples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = every_name()
    assert sample(names, 20, 1) == sample(names, 20, 1) != sample(names, 20, 2)
    assert len(sample(names, 20, 1)) == 20
    monkeypatch.setattr("tests.zoo.check.TABLE_OF", "0")
    assert {name.partition(":")[0] for name in sample(names, 20, 1)} == {"torchvision"}
    assert "its models are left out" in capsys.readouterr().out


def killed(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_check() -> None:  # as where memory is short: not a wait without end
    with pytest.raises(BrokenProcessPool):
        list(in_processes(killed, ["a", "b", "c"], 2))


def killed_if_large(name: str) -> tuple[str, dict[str, str]]:
    return (name, {"joint": "equal"}) if name == "small" else killed(name)  # type: ignore[return-value]


@pytest.mark.slow
def test_a_large_model_that_takes_too_much_loses_no_other() -> None:
    found = dict(alone(killed_if_large, ["large", "small"]))
    assert found == {"large": {"joint": "its process died: is there memory left?"}, "small": {"joint": "equal"}}


def name_and_process(name: str) -> tuple[str, int]:
    return name, os.getpid()


@pytest.mark.slow
def test_processes_are_new_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.zoo.check.FRESH", 3)
    names = [f"model{i}" for i in range(20)]
    made = list(in_processes(name_and_process, names, 2))
    assert [name for name, _ in made] == names
    assert len({process for _, process in made}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_efficientnet"])
def test_comparisons_of_a_sample(name: str) -> None:
    columns = compare(name)[1]
    assert (columns["joint"], columns["narrow"]) == ("equal", "equal")


@of_this_timm
def test_targets() -> None:
    torchvision_names = [f"torchvision:{n}" for n in torchvision.models.list_models(module=torchvision.models)]
    assert len(torchvision_names) == 80
    assert working(torchvision_names) == 1
    assert working([name for name in TABLE if family_of(name).startswith("torchvision segmentation")]) == 1
    assert working([f"torchvision:{n}" for n in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")]) == 1
    assert working([name for name in TABLE if name.startswith("timm:")]) > 0.98
    for column in ("joint", "narrow"):
        assert {getattr(row, column) for row in TABLE.values()} <= {"", "equal", "equal in float32"}


def test_detection_is_refused_with_advice() -> None:
    row = TABLE["torchvision:fasterrcnn_resnet50_fpn"]
    assert "make_detachable(model.backbone" in row.refusal


@of_this_timm
def test_the_page_is_made_from_the_table() -> None:
    from tests.zoo.check import PAGE

    table = page(list(TABLE.values())).split("| family |")[1]
    assert PAGE.read_text().split("| family |")[1] == table


def test_unknown_models() -> None:
    with pytest.raises(detachnet.ModelError, match="takes the name of a model, not int"):
        detachnet.create_model(3)  # type: ignore[arg-type]
    with pytest.raises(
        detachnet.ModelError, match=r"unknown model 'timm:resnet_18'[\s\S]*nearest .*timm:resnet18"
    ):
        detachnet.create_model("timm:resnet_18")
    with pytest.raises(detachnet.ModelError, match="timm:resnet18 cannot be built with"):
        detachnet.create_model("timm:resnet18", nothing=1)
    with pytest.raises(detachnet.ModelError, match=r"cannot be built with[\s\S]*depth is 6n \+ 2"):
        detachnet.create_model("detachnet:resnet_cifar", depth=21)


def test_resnets_for_small_images_have_the_papers_size() -> None:
    sizes = {20: 0.27, 56: 0.85}  # millions of parameters, He et al., table 6
    for depth, millions in sizes.items():
        model = detachnet.create_model("detachnet:resnet_cifar", depth=depth)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == pytest.approx(millions, abs=0.011)


def test_timms_tags() -> None:
    model = detachnet.create_model("timm:resnet18.a1_in1k", num_classes=5)
    source = model_source(model)
    assert source is not None
    assert (source.name, source.kwargs) == ("timm:resnet18.a1_in1k", {"num_classes": 5})
    with pytest.raises(detachnet.ModelError, match=r"timm has no weights 'resnet18.a2' of resnet18") as error:
        detachnet.create_model("timm:resnet18.a2")
    assert "timm:resnet18.a1_in1k" in error.value.candidates


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "timm/resnet18.a1_in1k", "hf_hub:timm/resnet18.a1_in1k"])
def test_names_as_others_write_them(name: str) -> None:
    with pytest.raises(detachnet.ModelError, match="unknown model") as error:
        detachnet.create_model(name)
    assert error.value.candidates[0] == "timm:resnet18.a1_in1k"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("resnet18", "fc"), ("googlenet", "fc")])
def test_published_weights_with_other_classes(
    name: str, layer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    published = torchvision.models.get_model(name, init_weights=False) if name == "googlenet" else None
    state = (published or torchvision.models.get_model(name)).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    with caplog.at_level("INFO"):
        model = detachnet.create_model(f"torchvision:{name}", pretrained=True, num_classes=7)
    assert f"'{layer}' is new, for 7 classes; the weights are of 1000" in caplog.text
    assert new_layers(model) == (layer,)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]) != key.startswith(f"{layer}."), key
    net = detachnet.make_detachable(model, 1, (3, 96, 96), check="none")
    detachnet.save(net, tmp_path / "net.safetensors")
    assert detachnet.load(tmp_path / "net.safetensors").base.fc.out_features == 7
    caplog.clear()
    same = detachnet.create_model(f"torchvision:{name}", weights="DEFAULT", num_classes=1000)
    assert torch.equal(same.fc.weight, state["fc.weight"])  # type: ignore[union-attr,arg-type]
    assert not caplog.text


def test_timm_says_that_the_classifier_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    with caplog.at_level("INFO"):
        detachnet.create_model("timm:resnet10t", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    assert "timm:resnet10t: 'fc' is new, for 7 classes; the weights are of 1000" in caplog.text


def test_a_function_of_ones_own_that_fails(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("def make():\n    return [][1]\n")
    said = r"make of .*net.py fails\n  what     IndexError: list index out of range\n  where .*net.py:2: return"
    with pytest.raises(detachnet.ModelError, match=said):
        build_model(f"{tmp_path / 'net.py'}:make")
