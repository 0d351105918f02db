"""The page of a family in a browser, with a stand-in of onnxruntime-web: npm's would need a network."""

import functools
import html
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from detachnet_cli.app import app
from PIL import Image
from typer.testing import CliRunner

import detachnet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RUNTIME = """
export class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
export const InferenceSession = { create: async (url, options) => {
  const graph = await (await fetch(url)).arrayBuffer();
  if (!graph.byteLength || !options.externalData[0].data.length) throw new Error("a file is empty");
  return { run: async ({ images }) => {
    const size = images.data.length / 3, sums = [0, 1, 2].map((c) =>
      images.data.slice(c * size, (c + 1) * size).reduce((a, b) => a + b) / size);
    return { logits: { data: Float32Array.from([...sums, -9, -9, -9, -9, -9, -9, -9]), dims: [1, 10] } };
  } };
} };
"""
"""Answers with the strongest colour."""


REPORT = """<script>
const waiting = setInterval(() => {
  const said = document.getElementById("title").textContent + document.getElementById("chosen").textContent;
  const done = document.body.dataset.state === (location.search ? "answered" : "ready");
  if (!done && !/cannot be shown|no image that/.test(said)) return;
  clearInterval(waiting);
  fetch("/seen", { method: "POST", body: document.documentElement.outerHTML });
}, 50);
</script>"""
"""Sends the page to the test when there is nothing more to come."""


class Server(ThreadingHTTPServer):
    """A folder's files, and what the browser made of its page."""

    seen: "queue.Queue[str]"


class Files(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/":
            return super().do_GET()
        page = Path(self.directory, "index.html").read_bytes() + REPORT.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)
        return None

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        assert isinstance(self.server, Server)
        self.server.seen.put(html.unescape(content.decode()))

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), functools.partial(Files, directory=str(tmp_path / "show")))
    server.seen = queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def opened(server: Server, folder: Path, query: str = "") -> str:
    """The page as the browser has it in the end."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    address = f"http://127.0.0.1:{server.server_port}/{query}"
    with subprocess.Popen(
        [CHROMIUM, *options, "--remote-debugging-port=0", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as browser:
        try:
            return server.seen.get(timeout=300)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_family_answers_in_a_browser(tmp_path: Path, server: Server) -> None:
    pytest.importorskip("onnx")
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(model, ["features.6"], check="none").eval()
    classes = ("red", "green", "blue", "d", "e", "f", "g", "h", "i", "j")
    data = detachnet.DataInfo(name="x", classes=classes, mean=(0.5,) * 3, std=(0.2,) * 3, num_test=9)
    net.facts = detachnet.Facts(data=data, accuracy={"base": 0.7, "sub0": 0.8})
    detachnet.save(net, tmp_path / "family.safetensors")
    words = ["demo", str(tmp_path / "family.safetensors"), "-o", str(tmp_path / "show")]
    out = CliRunner().invoke(app, words)
    assert out.exit_code == 0, out.output
    assert "npm install && python -m http.server" in out.output
    assert "exists already" in CliRunner().invoke(app, words).output
    assert "onnxruntime-web" in json.loads((tmp_path / "show" / "package.json").read_text())["dependencies"]
    assert len(list((tmp_path / "show" / "family").glob("*.onnx"))) == 2
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine (Debian: apt-get install chromium)")
    assert "run npm install in this folder" in opened(server, tmp_path)
    place = tmp_path / "show" / "node_modules" / "onnxruntime-web" / "dist"
    place.mkdir(parents=True)
    (place / "ort.wasm.min.mjs").write_text(RUNTIME)
    page = opened(server, tmp_path)
    assert 'data-state="ready"' in page
    assert "2 models, one set of weights" in page
    assert "Images of 3×32×32, 10 classes; accuracy on n = 9 test images" in page
    Image.new("RGB", (300, 200), (10, 200, 30)).save(tmp_path / "show" / "photo.png")
    page = opened(server, tmp_path, "?image=photo.png")
    assert 'data-state="answered"' in page
    assert '<p id="chosen" aria-live="polite">sub0: green</p>' in page  # the most accurate one
    rows = re.findall(r'<tr class="(\w*)"><th scope="row">(\w+)</th>.*?<div [^>]*>(\w+) ([\d.]+) %', page)
    assert [(chosen, name, label) for chosen, name, label, _ in rows] == [
        ("", "base", "green"),
        ("chosen", "sub0", "green"),
    ]
    assert float(rows[0][3]) > 90
    (tmp_path / "show" / "photo.png").write_bytes(b"none")
    assert "This is no image that the browser reads" in opened(server, tmp_path, "?image=photo.png")
