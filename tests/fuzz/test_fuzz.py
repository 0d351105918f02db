"""Whatever is typed or read: a result, or one of detachnet's errors; no traceback, no hang, no memory without end.

In the suite the inputs are the same every time. `make fuzz` (`FUZZ=10000 pytest tests/fuzz`) tries as many others.
"""

import copy
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save as to_bytes
from torch import Tensor

import detachnet
from detachnet.checkpoint import content as checkpoint
from detachnet.deploy import manifest as manifests
from detachnet.deploy.profile import read_profile, write_profile
from detachnet.errors import LONGEST, DetachNetError
from detachnet.selection.journal import Journal
from detachnet.storage import LAST, MANIFEST
from detachnet.training.recipe import load_recipe, parse_recipe
from detachnet.training.results import read_info, read_metrics, read_results
from tests import models
from tests.families import make, profile_of
from tests.runs import QUICKSTART

MANY = int(os.environ.get("FUZZ", "0"))
"""Inputs of `make fuzz`, all targets together; 0 for the suite's."""
MOST_S, MOST_BYTES = 60.0, 1 << 30
"""Of one input: seconds of CPU, and what the process may grow by."""
TARGETS = 9


def fuzz(number: int) -> settings:
    """So many inputs in the suite."""
    return settings(
        max_examples=MANY // TARGETS or number,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True, scope="module")
def _no_memory_without_end() -> Iterator[None]:
    """What would take all memory of the machine fails instead."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = Path("/proc/self/statm")
    if taken.exists():
        there = resource.getpagesize() * int(taken.read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (there + 4 * MOST_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def harmless(run: Callable[[], object]) -> object:
    """What a call returns, or nothing where it refuses in words.

    Raises:
        Exception: Whatever else it raises.
    """
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return run()
    except DetachNetError as error:
        lines = str(error).splitlines()
    finally:
        assert time.process_time() - began < MOST_S
        assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MOST_BYTES
    assert lines[0].strip()
    assert all(len(line) <= 2 * LONGEST for line in lines)
    return None


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        [2**31, 2**63, 10**400, -(2**64), 1e308, 5e-324, "", "..", "/", "a\0b", "\x1b[2J", "x" * 5000]
    )
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which some parts are others, missing, or there twice."""
    root = {"": copy.deepcopy(value)}
    for _ in range(draw(st.integers(1, 3))):
        where: Any = root
        key: Any = ""
        while isinstance(where[key], dict | list) and where[key] and draw(st.integers(0, 5)):
            where = where[key]
            key = draw(st.sampled_from(list(where) if isinstance(where, dict) else range(len(where))))
        kind = draw(st.sampled_from(["other", "other", "near", "missing", "twice", "more"]))
        if kind == "near" and isinstance(where[key], int | float):
            where[key] = where[key] * draw(st.sampled_from([-1, 0, 2, 10, 10**6, 10**12]))
        elif kind == "missing" and where is not root:
            del where[key]
        elif kind == "twice" and isinstance(where, list):
            where.append(copy.deepcopy(where[key]))
        elif kind == "more" and isinstance(where[key], dict):
            where[key][draw(st.text(max_size=6))] = draw(JUNK)
        else:
            where[key] = draw(JUNK)
        if kind == "missing" and not root:
            break
    return root.get("")


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are others, gone, or there twice."""
    value = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(value) - 1)))
        to = min(len(value), at + draw(st.integers(0, 30)))
        kind = draw(st.sampled_from(["flip", "cut", "end", "twice", "junk"]))
        if kind == "flip" and value:
            value[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del value[at:to]
        elif kind == "end":
            del value[at:]
        elif kind == "twice":
            value[at:at] = value[at:to] * draw(st.integers(1, 50))
        else:
            value[at:to] = draw(
                st.binary(max_size=20) | st.sampled_from([b"[" * 2000, b"9" * 5000, b"\xff", b'"'])
            )
    return bytes(value)


RECIPE = json.loads(load_recipe(QUICKSTART).model_dump_json())
KEYS = [f"{table}.{key}" for table, keys in RECIPE.items() if isinstance(keys, dict) for key in keys]


@pytest.mark.slow
@fuzz(250)
@given(altered(RECIPE))
def test_tables_of_a_recipe(tables: Any) -> None:
    recipe = harmless(lambda: parse_recipe(tables))
    if isinstance(recipe, detachnet.Recipe):
        assert harmless(lambda: parse_recipe(json.loads(recipe.model_dump_json()))) == recipe


@fuzz(100)
@given(damaged(QUICKSTART.read_bytes()))
def test_files_of_a_recipe(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = scratch(tmp_path_factory, "recipe") / "recipe.toml"
    path.write_bytes(content)
    recipe = harmless(lambda: load_recipe(path))
    if isinstance(recipe, detachnet.Recipe):
        path.write_text(recipe.to_toml())
        assert load_recipe(path) == recipe


VALUES = st.text(max_size=30) | JUNK.map(lambda value: json.dumps(value, default=str)) | st.integers().map(hex)


@fuzz(200)
@given(st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=20), VALUES), min_size=1, max_size=3))
def test_overrides(pairs: list[tuple[str, str]]) -> None:
    harmless(lambda: load_recipe(QUICKSTART, [f"{key}={value}" for key, value in pairs]))


NAMES = st.sampled_from(["conv1", "bn1", "pool", "conv2", "bn2", "mean", "fc", "x", "", "output", "relu", ":pool"])
SPANS = st.builds("{}:{}".format, NAMES, NAMES)
CUTS = (
    st.lists(NAMES | SCALARS, max_size=4)
    | st.dictionaries(NAMES | st.sampled_from(["small", "base", "half"]), NAMES | SPANS | SCALARS, max_size=3)
    | st.lists(st.floats(), max_size=3)
    | st.dictionaries(
        st.sampled_from(["a", "b"]),
        st.builds(
            lambda drop, width: (tuple(drop), width),
            st.lists(SPANS, max_size=3),
            st.floats(0.01, 1.0),
        ),
        max_size=2,
    )
    | JUNK
)


def sub_model(value: Any) -> Any:
    """One that leaves out spans and filters, where such were drawn."""
    return detachnet.SubModel(drop=value[0], width=value[1]) if isinstance(value, tuple) else value


@pytest.mark.slow
@fuzz(50)
@given(CUTS, st.sampled_from(["conv", "stem", "identity"]), st.sampled_from(["private", "shared"]))
def test_cuts_and_spans(cuts: Any, stepdown: Any, norm: Any) -> None:
    def run() -> object:
        made = {name: sub_model(value) for name, value in cuts.items()} if isinstance(cuts, dict) else cuts
        return detachnet.make_detachable(
            models.Plain(), made, (3, 8, 8), stepdown=stepdown, norm=norm, check="none"
        )

    net = harmless(run)
    if isinstance(net, detachnet.DetachableNet):
        assert len(net.eval()(torch.zeros(2, 3, 8, 8), which="all")) == len(net.names)


SIZES = (
    st.tuples(st.integers(1, 4), st.integers(1, 5000), st.integers(1, 5000))
    | st.tuples(*[st.integers(-1, 2**64)] * 3)
    | st.lists(SCALARS, max_size=5)
    | JUNK
)


@pytest.mark.slow
@fuzz(40)
@given(SIZES)
def test_sizes(size: Any) -> None:
    harmless(lambda: detachnet.make_detachable(models.Plain(), ["pool"], size, check="none"))


def scratch(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder, the same one for all inputs of a test."""
    folder = factory.getbasetemp() / f"fuzz-{name}"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a family of a user's own."""
    torch.manual_seed(0)
    net = detachnet.make_detachable(models.Plain(), ["conv1", "pool"], (3, 8, 8), check="none")
    data = detachnet.DataInfo(name="n", classes=("a", "b", "c", "d", "e"), mean=(0.5,) * 3, std=(0.2,) * 3)
    net.facts = detachnet.Facts(data=data, trained=("base", "sub1"), accuracy={"base": 0.5})
    detachnet.save(net, tmp_path_factory.getbasetemp() / "family.safetensors")
    header, tensors = checkpoint.read(tmp_path_factory.getbasetemp() / "family.safetensors")
    return json.loads(header.model_dump_json()), tensors


@pytest.mark.slow
@fuzz(60)
@given(st.data())
def test_headers(
    tmp_path_factory: pytest.TempPathFactory, family: tuple[dict[str, Any], dict[str, Tensor]], data: st.DataObject
) -> None:
    """With a right checksum, which anybody can compute; and damaged ones."""
    fields, tensors = family
    path = scratch(tmp_path_factory, "header") / "f.safetensors"
    text = json.dumps(data.draw(altered(fields)))
    content = to_bytes(
        tensors, {"format": "pt", checkpoint.KEY: text, "sha256": checkpoint._digest(text, tensors)}
    )
    path.write_bytes(data.draw(damaged(content)) if data.draw(st.integers(0, 4)) == 0 else content)
    harmless(lambda: detachnet.load(path, models.Plain()))


@pytest.mark.slow
@fuzz(150)
@given(st.data())
def test_manifests(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Of files that are there, with right checksums."""
    folder = scratch(tmp_path_factory, "manifest")
    (folder / "a.onnx").write_bytes(b"a")
    entry = manifests.exported_file(folder / "a.onnx")
    model = {"name": "base", "macs": 5, "num_params": 3, "num_bytes": 1, "accuracy": 0.5}
    known = manifests.Manifest(
        format="onnx",
        precision="float32",
        models=(manifests.ExportedModel(file=entry.file, sha256=entry.sha256, **model),),  # type: ignore[arg-type]
        weights=entry,
        input=manifests.ImageInput(name="image", shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.2,) * 3),
        output="logits",
        labels=("a", "b"),
        num_test=10,
    )
    fields = data.draw(altered(known.model_dump(mode="json")))
    if isinstance(fields, dict):
        fields["sha256"] = manifests._digest({key: fields[key] for key in fields if key != "sha256"})
    content = json.dumps(fields).encode()
    content = data.draw(damaged(content)) if data.draw(st.integers(0, 4)) == 0 else content
    (folder / MANIFEST).write_bytes(content)
    harmless(lambda: detachnet.read_manifest(folder))


ROW = {
    "epoch": 1,
    "lr": 0.1,
    "train_loss": {"base": 1.0, "sub0": 2.0},
    "test_loss": {"base": 1.0, "sub0": 2.0},
    "test_accuracy": {"base": 0.5, "sub0": 0.25},
}
RESULT = {"model": "base", "macs": 9, "macs_of_base": 1.0, "num_params": 4, "best_accuracy": 0.5}
RESULT |= {"best_epoch": 1, "last_accuracy": 0.5}
INFO = {"device": "x", "torch": "2", "train_s": 1.5, "seconds": None}


@pytest.fixture(scope="module")
def profile_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("profile")
    return write_profile(profile_of(make()), folder / LAST).read_text()


@pytest.mark.slow
@fuzz(150)
@given(st.data())
def test_files_of_a_run(tmp_path_factory: pytest.TempPathFactory, profile_text: str, data: st.DataObject) -> None:
    """With a right checksum where there is one; and damaged ones."""
    folder = scratch(tmp_path_factory, "run")
    (folder / LAST).touch()
    contents: dict[str, Any] = {
        "results.json": [RESULT, RESULT | {"model": "sub0"}],
        "metrics.jsonl": ROW,
        "run.json": INFO,
        "last.profile.json": json.loads(profile_text),
    }
    name = data.draw(st.sampled_from(sorted(contents)))
    content = json.dumps(data.draw(altered(contents[name]))).encode()
    content = data.draw(damaged(content)) if data.draw(st.integers(0, 3)) == 0 else content
    path = folder / name
    path.write_bytes(content)
    read: dict[str, Callable[[], object]] = {
        "results.json": lambda: read_results(path, ["base", "sub0"]),
        "metrics.jsonl": lambda: read_metrics(path, ["base", "sub0"]),
        "run.json": lambda: read_info(path),
        "last.profile.json": lambda: read_profile(folder),
    }
    harmless(read[name])


TRIED = {"tried": '{"drop": ["a:b"], "eighths": {"c": 4}}', "accuracy": 0.5, "loss": 1.5, "seconds": 0.25}


@pytest.mark.slow
@fuzz(150)
@given(st.data())
def test_files_of_a_search(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = scratch(tmp_path_factory, "search") / "search.jsonl"
    lines = [{"about": {"model": "Plain"}}, TRIED, {"note": "a:b", "value": 0.125}]
    number = data.draw(st.integers(0, 2))
    lines[number] = data.draw(altered(lines[number]))
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(data.draw(damaged(content)) if data.draw(st.integers(0, 3)) == 0 else content)
    harmless(lambda: Journal(path, {"model": "Plain"}))
