"""A stand-in of the Hub's HTTP interface on this machine: what is pushed to it loads from it."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet.models import VGG16Cifar
from detachnet.report.card import make_card

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
COMMIT = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory; large files go the way of Git LFS."""

    repos: dict[str, dict[str, bytes]]
    private: set[str]
    large: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self.body()
        if self.path == "/api/repos/create":
            return self.create(json.loads(sent))
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo = "/".join(self.path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if repo not in self.repos:
            return self.answer({"error": "Repository not found"}, 404)
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("tensors") else "regular"}
                for f in json.loads(sent)["files"]
            ]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if self.path.endswith("/objects/batch"):
            place = f"http://{self.headers['Host']}/large/"
            objects = [
                {**o, "actions": {"upload": {"href": place + o["oid"]}}} for o in json.loads(sent)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        return self.commit(repo, [json.loads(line) for line in sent.splitlines()])

    def body(self) -> bytes:
        if length := self.headers["Content-Length"]:
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization', 'me')}/{wanted['name']}"
        if name in self.repos:
            return self.answer(
                {"error": "You already created it", "url": f"http://{self.headers['Host']}/{name}"}, 409
            )
        self.repos[name] = {}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.private.add(name)
        return self.answer({"url": f"http://{self.headers['Host']}/{name}"})

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.large[value["oid"]]
        self.answer({"commitUrl": f"https://huggingface.co/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.large[oid] = content
        self.answer({})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            name = self.path.removeprefix("/api/models/")
            return self.answer({"id": name, "private": name in self.private})
        owner, name, *rest = self.path.lstrip("/").split("/")
        content = self.repos.get(f"{owner}/{name}", {}).get(rest[-1] if rest else "")
        if rest[:2] != ["resolve", "main"] or content is None:
            code = "EntryNotFound" if f"{owner}/{name}" in self.repos else "RepoNotFound"
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": code})
        return self.send(
            200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        )

    do_HEAD = do_GET

    def answer(self, content: object, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(code, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Here", (Hub,), {"repos": {}, "private": set(), "large": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield handler
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def family(model: torch.nn.Module | None = None) -> detachnet.DetachableNet:
    model = model or detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(model, ["features.6"], (3, 32, 32), check="none").eval()
    data = detachnet.DataInfo(
        name="cifar10", classes=tuple("0123456789"), mean=(0.5,) * 3, std=(0.2,) * 3, num_test=9
    )
    net.facts = detachnet.Facts(data=data, accuracy={"base": 0.8765, "sub0": 0.7})
    return net


@pytest.mark.slow
def test_what_is_pushed_loads_again(hub: type[Hub]) -> None:
    net = family()
    with pytest.raises(detachnet.CheckpointError, match="wants to know the licence"):
        detachnet.push_to_hub(net, "me/family", license="")
    assert detachnet.push_to_hub(net, "me/family", license="apache-2.0", private=True).endswith(COMMIT)
    assert (hub.private, sorted(hub.repos["me/family"])) == (
        {"me/family"},
        ["README.md", "accuracy.png", "family.safetensors"],
    )
    assert hub.repos["me/family"]["accuracy.png"][:4] == b"\x89PNG"
    images = torch.randn(2, 3, 32, 32)
    again = detachnet.load("hf-hub:me/family")
    assert torch.equal(again(images, which="sub0"), net(images, which="sub0"))
    assert again.facts == net.facts
    assert detachnet.Family.load("hf-hub:me/family").names == net.names
    detachnet.push_to_hub(net, "me/family", license="mit")  # a second commit
    assert b'license: "mit"' in hub.repos["me/family"]["README.md"]


@pytest.mark.slow
def test_what_is_private_is_not_written_where_all_see_it(hub: type[Hub]) -> None:
    net = family()
    detachnet.push_to_hub(net, "me/open", license="mit")
    hub.repos["me/open"].clear()
    with pytest.raises(
        detachnet.CheckpointError, match=r"'me/open' is on the Hub already and public[\s\S]*another name"
    ):
        detachnet.push_to_hub(net, "me/open", license="mit", private=True)
    assert hub.repos["me/open"] == {}
    detachnet.push_to_hub(net, "me/own", license="mit", private=True)
    detachnet.push_to_hub(net, "me/own", license="mit", private=True)  # there, and private
    assert "README.md" in hub.repos["me/own"]


@pytest.mark.slow
def test_what_is_fetched_once_needs_no_network(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    detachnet.push_to_hub(family(), "me/family", license="mit")
    detachnet.load("hf-hub:me/family")
    hub.repos.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert detachnet.load("hf-hub:me/family").names == ("base", "sub0")
    with pytest.raises(detachnet.CheckpointError, match="hf-hub:me/other cannot be fetched"):
        detachnet.load("hf-hub:me/other")


@pytest.mark.parametrize(
    ("name", "said"), [("me/none", "hf-hub:me/none cannot be fetched"), ("a/b/c", "cannot be fetched")]
)
def test_what_is_not_there(hub: type[Hub], name: str, said: str) -> None:
    with pytest.raises(
        detachnet.CheckpointError, match=said + r"\n  what +[\s\S]*  try +a name is hf-hub:OWNER/NAME"
    ):
        detachnet.load(f"hf-hub:{name}")


def test_a_repository_without_a_family(hub: type[Hub]) -> None:
    hub.repos["me/other"] = {"model.safetensors": b"0"}
    with pytest.raises(detachnet.CheckpointError, match="hf-hub:me/other cannot be fetched"):
        detachnet.load("hf-hub:me/other")


@pytest.mark.slow
def test_a_model_of_ones_own_is_never_run_from_there(hub: type[Hub]) -> None:
    class Net(VGG16Cifar):
        pass

    detachnet.push_to_hub(family(Net(width=0.05)), "me/own", license="mit")
    card = hub.repos["me/own"]["README.md"].decode()
    assert 'detachnet.load("hf-hub:me/own", model=Net(...))' in card
    with pytest.raises(detachnet.CheckpointError, match="was made from a model of the user's own, Net"):
        detachnet.load("hf-hub:me/own")
    assert detachnet.load("hf-hub:me/own", model=Net(width=0.05)).names == ("base", "sub0")


@pytest.mark.slow
def test_the_command(hub: type[Hub], tmp_path: Path) -> None:
    net = family()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text('description = "mine"\n')
    detachnet.save(net, tmp_path / "run" / "last.safetensors")
    options = ["--license", "apache-2.0", "--base-model", "timm/resnet18.a1_in1k"]
    out = CliRunner().invoke(app, ["push", str(tmp_path / "run"), "me/mine", *options])
    assert out.exit_code == 0, out.output
    assert "Read it: detachnet.load('hf-hub:me/mine')" in out.output
    card = hub.repos["me/mine"]["README.md"].decode()
    assert 'description = "mine"' in card
    assert 'base_model: "timm/resnet18.a1_in1k"' in card
    out = CliRunner().invoke(
        app, ["detach", "hf-hub:me/mine", "--model", "sub0", "-o", str(tmp_path / "s.safetensors")]
    )
    assert out.exit_code == 0, out.output
    out = CliRunner().invoke(app, ["push", str(tmp_path / "run"), "me/mine"])
    assert (out.exit_code, "--license" in out.output) == (2, True)


def test_a_card() -> None:
    net = family()
    card = make_card(net, "me/family", "apache-2.0", recipe='description = "x"', base_model="timm/x")
    assert huggingface_hub.ModelCard(card).data.license == "apache-2.0"
    assert "| `base` |" in card
    assert "87.65 %" in card
    assert "Accuracy on n = 9 test images of cifar10." in card
    assert "The weights: apache-2.0. They started from `timm/x`." in card
    assert net.facts.data is not None
    net.facts = net.facts.updated(data=net.facts.data.model_copy(update={"num_test": 0}))
    assert "Accuracy on test images of cifar10." in make_card(net, "me/family", "mit")
    net.facts = detachnet.Facts()
    bare = make_card(net, "me/family", "mit")
    assert "accuracy" not in bare
    assert "## Data" not in bare
