"""What is said of fields that do not fit, of every class with fields that people make."""

import copy
import pickle
from collections.abc import Callable

import pytest
from pydantic import ValidationError

import detachnet
from detachnet.deploy.manifest import ExportedFile
from detachnet.deploy.measurement import Latency
from detachnet.deploy.profile import Profile
from detachnet.fields import Fields, read_error
from detachnet.training.tables import LossTable

DATA = {"name": "x", "classes": ("a", "b"), "mean": (0.0,), "std": (1.0,)}


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (
            lambda: detachnet.SubModel(drop=["a:b"], head="private"),
            detachnet.CutError,
            r"SubModel has no field 'head'\n  nearest  'drop', 'width', 'filters'",
        ),
        (lambda: detachnet.SubModel(widht=0.5), detachnet.CutError, "has no field 'widht'\n  nearest  'width'$"),
        (
            lambda: detachnet.SubModel("a:b"),
            detachnet.CutError,
            r"takes its fields by name: SubModel\(drop=…, width",
        ),
        (lambda: detachnet.SubModel(drop="a:b"), detachnet.CutError, r"not a string: write drop=\['a:b'\]"),
        (lambda: detachnet.SubModel(drop=[1]), detachnet.CutError, r"SubModel\(drop.0=1\): it must be a text"),
        (lambda: detachnet.SubModel(width="0.5"), detachnet.WidthError, "width='0.5'.: it must be a number or"),
        (lambda: detachnet.SubModel(width=True), detachnet.WidthError, "width=True.: it must be a number or"),
        (
            lambda: detachnet.SubModel(width={"a": "0.5"}),
            detachnet.WidthError,
            "width={'a': '0.5'}.: it must be a number",
        ),
        (
            lambda: detachnet.SubModel(drop=["a:b"], filters="important"),
            detachnet.CutError,
            "says which filters stay, but all do",
        ),
        (lambda: detachnet.train("r.toml"), detachnet.RecipeError, r"train\(detachnet.load_recipe\('r.toml'\)\)"),
        (
            lambda: detachnet.load_recipe("quickstart", "train.epochs=1"),
            detachnet.RecipeError,
            r"overrides is a list, not a text[\s\S]*\['train.epochs=1'\]",
        ),
        (lambda: detachnet.SubModel(), detachnet.CutError, "this is the base-model: a sub-model is SubModel"),
        (
            lambda: detachnet.SubModel(width="x"),
            detachnet.WidthError,
            r"SubModel\(width='x'\): it must be a number or a table",
        ),
        (lambda: detachnet.SubModel(width=2.0), detachnet.WidthError, r"width=2.0: a width is a share"),
        (
            lambda: detachnet.SubModel(width=0.5, filters="x"),
            detachnet.WidthError,
            "it must be one of 'first' or 'impor",
        ),
        (lambda: detachnet.Stem(depth=0), detachnet.StepDownError, r"Stem\(depth=0\): it must be above 0"),
        (lambda: detachnet.Stem(deep=1), detachnet.StepDownError, "Stem has no field 'deep'\n  nearest  'depth'"),
        (
            lambda: detachnet.DataInfo(name="x", classes=("a",)),
            detachnet.DataError,
            r"DataInfo lacks 'mean'\n  try +DataInfo\(name=…, classes=…, mean=…, std=…\)",
        ),
        (
            lambda: detachnet.DataInfo(**(DATA | {"std": 1})),
            detachnet.DataError,
            r"DataInfo\(std=1\): it must be a list",
        ),
        (
            lambda: detachnet.Facts(acuracy={}),
            detachnet.CheckpointError,
            "has no field 'acuracy'\n  nearest  'acc",
        ),
        (
            lambda: detachnet.Facts(accuracy={"base": "high"}),
            detachnet.CheckpointError,
            r"Facts\(accuracy.base='high'\): it must be a number",
        ),
        (
            lambda: LossTable(distillation=-1.0),
            detachnet.RecipeError,
            r"distillation=-1.0\): it must be at least 0",
        ),
        (lambda: LossTable(hint="much"), detachnet.RecipeError, r"LossTable\(hint='much'\): it must be a number"),
    ],
)
def test_fields_that_do_not_fit(make: Callable[[], object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said) as error:
        make()
    for word in ("input should", "Input should", "xtra inputs", "validation error", "Value error"):
        assert word not in str(error.value)


def plan() -> detachnet.DetachPlan:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    return detachnet.make_detachable(model, ["features.6"], check="none").plan


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (detachnet.SubModel(width=0.5), "width"),
        (detachnet.Facts(), "accuracy"),
        (detachnet.Stem(), "depth"),
        (LossTable(), "hint"),
        (detachnet.DataInfo(**DATA), "name"),
    ],
)
def test_they_do_not_change(value: Fields, name: str) -> None:
    with pytest.raises(
        detachnet.DetachNetError, match=rf"does not change: '{name}' cannot be set\n  try +value.model"
    ):
        setattr(value, name, None)
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value


def test_a_plan_does_not_change() -> None:
    with pytest.raises(detachnet.ModelError, match="a DetachPlan does not change: 'hints' cannot be set"):
        plan().hints = ()


LATENCY = {
    "runtime": "torch",
    "device": "cpu",
    "batch": 1,
    "threads": 1,
    "n": 9,
    "p50_s": 1,
    "p90_s": 1,
    "p99_s": 1,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p50_s": 0}, "p50_s is 0: it must be above 0"),
        ({"runtime": "tflite"}, "runtime is 'tflite': it must be one of 'torch' or 'onnx'"),
        ({"n": "x" * 500}, "n is 'xxx"),
        ({"extra": 1}, "there is no field extra"),
        ({"device": None}, "device is None: it must be a text"),
    ],
    ids=str,
)
def test_what_is_said_of_fields_of_files(change: dict[str, object], said: str) -> None:
    given = LATENCY | change
    with pytest.raises(ValidationError) as error:
        Latency.model_validate(given)
    found = read_error(error.value, given)
    assert found.startswith(said)
    assert len(found) < 120


def test_what_is_said_of_files_that_lack_something() -> None:
    with pytest.raises(ValidationError) as error:
        Profile.model_validate({"rows": [LATENCY], "hardware": {}, "versions": {}, "memory": ""})
    assert read_error(error.value, {"rows": [LATENCY]}) == "rows.0.model is missing"
    with pytest.raises(ValidationError) as error:
        Profile.model_validate([])
    assert read_error(error.value, []) == "it is []: it must be a table"
    assert read_error(ValueError("no number"), None) == "no number"
    with pytest.raises(detachnet.MeasurementError, match=r"Latency\(n=0\): it must be above 0"):
        Latency(**(LATENCY | {"n": 0}))
    with pytest.raises(detachnet.ExportError, match="ExportedFile lacks 'num_bytes'"):
        ExportedFile(file="a", sha256="")
