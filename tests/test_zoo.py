"""The checked-in table of every model; a sample of it is run here, all of it by `make zoo`."""

import pytest
import timm
import torchvision

import detachnet
from tests.zoo.check import check, check_joint, every_name, family_of, page, read_table

TABLE = {row.name: row for row in read_table()}
SAMPLE = sorted({row.family: row.name for row in TABLE.values()}.values())[::6]


def working(names: list[str]) -> float:
    rows = [TABLE[name] for name in names]
    return sum(bool(row.cuts) and row.cuts != "0" and not row.refusal for row in rows) / len(rows)


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the table is of timm 1.0.31")
def test_the_table_has_every_name() -> None:
    assert set(TABLE) == set(every_name())


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_table(name: str) -> None:
    row, known = check(name), TABLE[name]
    assert (row.cuts, row.refusal) == (known.cuts, known.refusal)


@pytest.mark.parametrize("name", ["timm:levit_128s", "timm:mobilevitv2_050"])
def test_joint_passes_of_a_sample(name: str) -> None:
    assert check_joint(name) == (name, "equal")


def test_targets() -> None:
    torchvision_names = [f"torchvision:{n}" for n in torchvision.models.list_models(module=torchvision.models)]
    assert len(torchvision_names) == 80
    assert working(torchvision_names) == 1
    assert working([name for name in TABLE if family_of(name).startswith("torchvision segmentation")]) == 1
    assert working([f"torchvision:{n}" for n in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")]) == 1
    assert working([name for name in TABLE if name.startswith("timm:")]) > 0.98
    assert {row.joint for row in TABLE.values()} <= {"", "equal", "equal in float32"}


def test_detection_is_refused_with_advice() -> None:
    row = TABLE["torchvision:fasterrcnn_resnet50_fpn"]
    assert "make_detachable(model.backbone" in row.refusal


def test_the_page_is_made_from_the_table() -> None:
    from tests.zoo.check import PAGE

    table = page(list(TABLE.values())).split("| family |")[1]
    assert PAGE.read_text().split("| family |")[1] == table


def test_unknown_models() -> None:
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
