"""Files that somebody else made: they run nothing, take nothing, and reading them ends."""

import io
import json
import math
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detachnet_cli.app import app
from detachnet_cli.console import plain
from detachnet_cli.opening import known_root, run_recipe
from safetensors.torch import save as to_bytes
from torch import nn
from typer.testing import CliRunner

import detachnet
from detachnet.checkpoint import content as checkpoint
from detachnet.data.folders import _class_names, open_files
from detachnet.data.images import read_image
from detachnet.deploy.backends import OnnxBackend
from detachnet.deploy.manifest import _digest
from detachnet.memory import Bounded, Brief, TooMuchError
from detachnet.storage import MANIFEST
from detachnet.training.weights import read_start
from tests.helpers import nightly_but

pytestmark = pytest.mark.slow

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def net() -> detachnet.DetachableNet:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    made = detachnet.make_detachable(model, ["features.6", "features.23"], check="none").eval()
    data = detachnet.DataInfo(name="two", classes=("a", "b"), mean=(0.5,) * 3, std=(0.2,) * 3)
    made.facts = detachnet.Facts(data=data, trained=("base",), accuracy={"base": 0.5})
    return made


def forge(net: detachnet.DetachableNet, path: Path, change: Change, which: str | None = None) -> None:
    """A file with another header and a right checksum."""
    detachnet.save(net, path, which)
    header, tensors = checkpoint.read(path)
    fields = json.loads(header.model_dump_json())
    text = change(fields)
    text = text if isinstance(text, str) else json.dumps(fields)
    digest = checkpoint._digest(text, tensors)
    path.write_bytes(to_bytes(tensors, {"format": "pt", checkpoint.KEY: text, "sha256": digest}))


def source(name: str, **kwargs: object) -> Change:
    return lambda fields: fields.update(source={"name": name, "kwargs": kwargs})


def stem(depth: int, width: float) -> Change:
    def change(fields: dict[str, Any]) -> None:
        for model in fields["plan"]["models"][1:]:
            for span in model["spans"]:
                span["bridge"] |= {"kind": "stem", "stem": {"depth": depth, "width": width}}

    return change


@pytest.mark.parametrize("which", nightly_but([None], [None, "sub1"]))
@pytest.mark.parametrize(
    "change",
    [
        source("detachnet:vgg16_cifar", width=30),
        source("detachnet:resnet_cifar", depth=1982, width=64),
        source("detachnet:resnet_cifar", depth=60002),
        source("detachnet:nsn", depth=2000),
        source("timm:vit_giant_patch14_224"),
        source("timm:resnet50", num_classes=10**6),
        source("timm:resnet50", num_classes=10**12),
        source("timm:vit_tiny_patch16_224", depth=10**6),
        stem(100, 64),
        stem(10**6, 1.0),
        lambda fields: fields["plan"].update(input_size=[3, 100_000, 100_000]),
    ],
)
def test_a_header_takes_no_more_than_its_file(
    net: detachnet.DetachableNet, tmp_path: Path, change: Change, which: str | None
) -> None:
    path = tmp_path / "f.safetensors"
    forge(net, path, change, which)
    began = time.process_time()
    with pytest.raises(
        detachnet.CheckpointError,
        match=r"does not fit|far larger than its weights|something unknown|cannot be built|does not allow|plan in",
    ):
        detachnet.load(path)
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    ("make", "num_bytes", "num_tensors"),
    [
        (lambda: torch.empty(10**15), 10**6, 10),
        (lambda: torch.nn.Linear(10**7, 10**7), 10**6, 10),
        (lambda: [torch.ones(1000) for _ in range(300)], 10**6, 1000),
        (lambda: [torch.zeros(1, device="meta") for _ in range(30)], 10**6, 20),
        (lambda: torch.arange(10**6), 10**6, 10),
    ],
)
def test_bounds(make: Callable[[], object], num_bytes: int, num_tensors: int) -> None:
    with pytest.raises(TooMuchError), Bounded(num_bytes, num_tensors):
        make()


@pytest.mark.parametrize(("num_calls", "num_layers"), [(10, 100), (1000, 10)])
def test_operators_and_layers_are_bounded(num_calls: int, num_layers: int) -> None:
    def make() -> list[float]:
        nn.Sequential(*(nn.ReLU() for _ in range(30)))
        return [value.item() for value in torch.ones(30)]

    with pytest.raises(TooMuchError), Brief(num_calls, num_layers):
        make()
    with Brief(200, 100):
        assert sum(make()) == 30
    assert sum(make()) == 30


def test_within_bounds() -> None:
    with Bounded(5000, 10):
        values = torch.ones(1000)
        values.add_(1)
        views = [values.view(10, 100) for _ in range(20)]
        torch.nn.Linear(10**6, 10**6, device="meta")
    assert views[0].sum() == 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(dtype="quint8"), "dtype"),
        (lambda f: f.update(accuracy={"base": math.nan}), "accuracy of base is nan"),
        (lambda f: f.update(accuracy={"base": 1.5}), "accuracy of base is 1.5"),
        (lambda f: f.update(accuracy={"nobody": 0.5}), "accuracy names 'nobody'"),
        (lambda f: f.update(trained=["nobody"]), "trained names 'nobody'"),
        (lambda f: f["plan"]["models"][0].update(macs=-5), "a count of base is negative"),
        (lambda f: f["plan"]["models"][1].update(num_params=-5), "a count of sub0 is negative"),
        (lambda f: f["plan"].update(model="\x1b]0;x\x07"), "is no name"),
        (lambda f: f["plan"]["models"].append(f["plan"]["models"][1]), "a model is there twice"),
        (lambda f: f["data"].update(std=[0.1, 0.0, 0.1]), "mean, std"),
        (lambda f: f["data"].update(mean=[math.inf] * 3), "mean, std"),
        (lambda f: f["data"].update(num_test=-1), "mean, std"),
        (lambda f: '{"format_version": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        (lambda f: '{"format_version": ' + "9" * 5000 + "}", "digits"),
        (lambda f: "[1]", "something unknown"),
    ],
)
def test_a_header_is_checked_as_a_whole(
    net: detachnet.DetachableNet, tmp_path: Path, change: Change, message: str
) -> None:
    path = tmp_path / "f.safetensors"
    forge(net, path, change)
    with pytest.raises(detachnet.CheckpointError, match=message) as error:
        detachnet.load(path)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("key", ["macs", "num_params"])
def test_the_plan_in_a_file_is_that_of_its_network(net: detachnet.DetachableNet, tmp_path: Path, key: str) -> None:
    path = tmp_path / "f.safetensors"
    forge(net, path, lambda fields: fields["plan"]["models"][1].update({key: 1}))
    with pytest.raises(detachnet.CheckpointError, match=r"the plan in the file is not that of sub0"):
        detachnet.load(path)


def test_facts_that_no_file_may_say_are_not_written(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    facts = net.facts
    try:
        net.facts = facts.updated(accuracy={"base": math.nan})
        with pytest.raises(detachnet.CheckpointError, match=r"cannot be stored[\s\S]*accuracy of base is nan"):
            detachnet.save(net, tmp_path / "f.safetensors")
    finally:
        net.facts = facts


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_opened(net: detachnet.DetachableNet, tmp_path: Path, kind: str) -> None:
    def put(path: Path) -> Path:
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        return path

    with pytest.raises(detachnet.CheckpointError, match="it is a pipe or a device"):
        detachnet.load(put(tmp_path / "f.safetensors"))
    with pytest.raises(detachnet.DataError, match=r"cannot be read\n[\s\S]*it is a pipe or a device"):
        read_image(put(tmp_path / "f.png"))
    detachnet.export(net, tmp_path / "out", models=["sub1"])
    graph = put(tmp_path / "out" / "sub1.onnx")
    for read in (lambda: detachnet.read_manifest(tmp_path / "out"), lambda: detachnet.open_graph(graph)):
        with pytest.raises(detachnet.ExportError, match="it is a pipe or a device"):
            read()
    put(tmp_path / "out" / MANIFEST)
    with pytest.raises(detachnet.ExportError, match="it is a pipe or a device"):
        detachnet.read_manifest(tmp_path / "out")


def test_no_pipe_beside_a_file_is_opened(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    """What a command looks for on its way: a recipe, what a run noted, weights to start from, classes, images."""
    for name in ("recipe.toml", "run.json", "w.safetensors", "w.pth", "classes.txt"):
        os.mkfifo(tmp_path / name)
    assert run_recipe(tmp_path) == {}
    assert known_root(tmp_path, None) is None
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(detachnet.CheckpointError, match="it is a pipe or a device"):
            read_start(tmp_path / name, ["a"])
    with pytest.raises(detachnet.DataError, match=r"do not say their classes[\s\S]*it is a pipe or a device"):
        _class_names(tmp_path)
    detachnet.save(net, tmp_path / "last.safetensors")
    with pytest.raises(
        detachnet.CheckpointError, match=r"cannot read .*recipe\.toml[\s\S]*it is a pipe or a device"
    ):
        detachnet.push_to_hub(tmp_path, "me/mine", license="mit")
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        os.mkfifo(tmp_path / split / "a" / "x.png")
    with pytest.raises(detachnet.DataError, match=r"x\.png cannot be read[\s\S]*it is a pipe or a device"):
        open_files("folder", tmp_path, "train").read(0)


def test_what_a_run_noted_may_be_deep(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("a = " + "[" * 100_000)
    (tmp_path / "run.json").write_text("[" * 100_000)
    assert run_recipe(tmp_path) == {}
    assert known_root(tmp_path, None) is None


def test_where_a_run_found_its_data_may_be_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "run.json").write_text(json.dumps({"data_root": str(tmp_path)}))
    assert (known_root(tmp_path, None), caplog.messages) == (tmp_path, [])
    (tmp_path / "run.json").write_text(json.dumps({"data_root": str(tmp_path / "there")}))
    assert known_root(tmp_path, None) is None
    assert caplog.messages == [f"{tmp_path / 'there'}, where the run found its data, is gone"]


@pytest.fixture(scope="module")
def graphs(net: detachnet.DetachableNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    detachnet.export(net, folder / "pt2", "pt2", ["sub1"])
    detachnet.export(net, folder / "onnx", models=["sub1"])
    return folder


def model_json(change: Change) -> Callable[[dict[str, bytes]], object]:
    def apply(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.endswith("models/model.json"))
        model = json.loads(members[name])
        change(model)
        members[name] = json.dumps(model).encode()

    return apply


def first_node(**fields: object) -> Change:
    return lambda model: model["graph_module"]["graph"]["nodes"][0].update(fields)


def expression(members: dict[str, bytes]) -> None:
    name = next(name for name in members if name.endswith("models/model.json"))
    code = rb"\"expr_str\": \"__import__('pathlib').Path('touched').touch() or Symbol('s1')\""
    members[name], count = re.subn(rb'"expr_str": "[^"]*"', code, members[name])
    assert count


def arguments(model: dict[str, Any]) -> None:
    call = model["graph_module"]["module_call_graph"][0]["signature"]
    call["forward_arg_names"] = ["x=__import__('pathlib').Path('touched').touch()"]


def nesting(text: str) -> Change:
    """How arguments are nested, in another way."""

    def apply(model: dict[str, Any]) -> None:
        model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = text

    return model_json(apply)


PT2 = {
    "library": lambda m: m.update({"sub1/data/aotinductor/m/e.wrapper.so": b"\x7fELF"}),
    "pickle": lambda m: m.update({"sub1/data/constants/custom_obj_0": b"\x80\x04N."}),
    "inputs": lambda m: m.update({"sub1/data/sample_inputs/model.pt": b"\x80\x04N."}),
    "outside": lambda m: m.update({"sub1/../weight_0": b""}),
    "from_file": model_json(first_node(target="torch.ops.aten.from_file.default")),
    "write_file": model_json(first_node(target="torch.ops.image.write_file.default")),
    "hub": model_json(first_node(target="torch.hub.load")),
    "operator": model_json(first_node(target="_operator.methodcaller")),
    "expression": expression,
    "arguments": model_json(arguments),
    "name": model_json(first_node(name="a\nimport os")),
    "nested many times": nesting('"null"' * 40 + "!"),
    "nested deeply": nesting("[" * 1000 + "]" * 1000),
    "nested in code": nesting('[1, {"type": "eval(1)", "context": null, "children_spec": []}]'),
    "nested in no names": nesting('[1, {"type": "builtins.dict", "context": "{}", "children_spec": []}]'),
    "nested in fractions": nesting("[1.5, null]"),
    "nested in large numbers": nesting("[10000, null]"),
    "deep": lambda m: m.update({"sub1/models/model.json": b"[" * 100_000}),
}


@pytest.mark.parametrize("kind", PT2)
def test_a_pt2_file_runs_nothing(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(graphs / "pt2" / "sub1.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    PT2[kind](members)
    with zipfile.ZipFile("evil.pt2", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(detachnet.ExportError, match=r"evil\.pt2 (holds what detachnet never|is no complete pt2)"):
        detachnet.open_graph("evil.pt2")
    assert not Path("touched").exists()


def test_the_guards_of_a_pt2_file_are_left_out(
    net: detachnet.DetachableNet, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(graphs / "pt2" / "sub1.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    code = "__import__('pathlib').Path('touched').touch() or True"
    model_json(lambda model: model.update(guards_code=[code]))(members)
    model_json(first_node(metadata={"stack_trace": f"\n{code}\n"}))(members)
    with zipfile.ZipFile("guarded.pt2", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    images = torch.randn(2, 3, 32, 32)
    found = detachnet.open_graph("guarded.pt2")(images)
    assert not Path("touched").exists()
    with torch.no_grad():
        torch.testing.assert_close(found, net(images, which="sub1"), rtol=1e-5, atol=1e-5)


def test_a_compressed_member_may_be_a_bomb(graphs: Path, tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(graphs / "pt2" / "sub1.pt2") as archive,
        zipfile.ZipFile(tmp_path / "f.pt2", "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for name in archive.namelist():
            made.writestr(name, archive.read(name))
    with pytest.raises(detachnet.ExportError, match=r"holds what detachnet never writes[\s\S]*compressed"):
        detachnet.open_graph(tmp_path / "f.pt2")


def export_again(graphs: Path, folder: Path, change: Change) -> Path:
    """A copy of the ONNX folder whose manifest says something else, with a right checksum."""
    folder.mkdir()
    for path in (graphs / "onnx").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    fields = json.loads((folder / MANIFEST).read_text())
    del fields["sha256"]
    change(fields)
    (folder / MANIFEST).write_text(json.dumps(fields | {"sha256": _digest(fields)}))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(models=[]),
        lambda f: f.update(models=[*f["models"], *f["models"]]),
        lambda f: f["models"][0].update(accuracy=math.nan),
        lambda f: f["models"][0].update(macs=-1),
        lambda f: f["models"][0].update(file="../sub1.onnx"),
        lambda f: f["input"].update(shape=[3, 31, 31]),
        lambda f: f["input"].update(shape=[3, -1, 32]),
        lambda f: f["input"].update(shape=[3, 10**6, 32]),
        lambda f: f["input"].update(name="nothing"),
        lambda f: f["input"].update(std=[0.0, 0.0, 0.0]),
        lambda f: f.update(output="nothing"),
        lambda f: f.update(num_test=-1),
        lambda f: f.update(weights=None),
        lambda f: f.update(labels=[[[]]]),
    ],
)
def test_a_manifest_is_checked_as_a_whole(graphs: Path, tmp_path: Path, change: Change) -> None:
    folder = export_again(graphs, tmp_path / "out", change)
    with pytest.raises(detachnet.ExportError, match=r"is no manifest|is not what|none of its own"):
        OnnxBackend(folder)


@pytest.mark.parametrize("kind", ["file", "loop", "junk"])
def test_an_onnx_graph_reads_its_weights_only_and_ends(graphs: Path, tmp_path: Path, kind: str) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(graphs / "onnx" / "sub1.onnx", load_external_data=False)
    if kind == "file":
        entry = next(e for t in model.graph.initializer for e in t.external_data if e.key == "location")
        entry.value = "../secret"
    if kind == "loop":
        inside = onnx.helper.make_graph([], "inside", [], [])
        model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["never"], body=inside))
    content = b"junk" if kind == "junk" else model.SerializeToString()
    (tmp_path / "f.onnx").write_bytes(content)
    with pytest.raises(detachnet.ExportError, match=r"refers to a file|holds a Loop|is no ONNX graph|cannot open"):
        detachnet.open_graph(tmp_path / "f.onnx")


EVIL = "a\x1b]0;title\x07\x1b[2Jb\x9b31m\u202e\r\x08[bold]"


def test_nothing_speaks_to_the_terminal(tmp_path: Path) -> None:
    assert re.fullmatch(r"[ -~]*", plain(EVIL))
    assert plain("MACs, 3×32 – 5\xa0%\nnext") == "MACs, 3×32 – 5\xa0%\nnext"
    model = detachnet.create_model("detachnet:vgg16_cifar", num_classes=3, width=0.05)
    made = detachnet.make_detachable(model, ["features.6"], check="none")
    data = detachnet.DataInfo(name="x", classes=(EVIL, EVIL, EVIL), mean=(0.5,) * 3, std=(0.2,) * 3)
    made.facts = detachnet.Facts(data=data)
    path = tmp_path / "f.safetensors"
    detachnet.save(made, path)
    read_image(picture()).save(tmp_path / "a\x1b[2J.png")
    (tmp_path / "b\x1b[2J.png").write_text("no picture")
    pictures = [str(tmp_path / f"{name}\x1b[2J.png") for name in "abc"]
    for words in (
        ["predict", str(path), *pictures],
        ["evaluate", str(tmp_path / "\x1b[2J")],
        ["train", "\x1b[2J"],
    ):
        output = CliRunner().invoke(app, words).output
        assert output
        assert not [c for c in output if not c.isprintable() and c not in "\n\xa0\u202f"]


def picture() -> io.BytesIO:
    file = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (32, 32)).save(file, "PNG")
    file.seek(0)
    return file
