import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet.deploy.profile import profile, write_profile
from detachnet.report.page import Page, make_page
from detachnet.report.record import read_run
from detachnet.training.trainer import train
from tests.runs import recipe

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert('1')</script>\"&"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, little_data: None) -> Path:
    """A run with a profile."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(recipe("train.epochs=2"), folder)
    measured = profile(detachnet.load(folder / "last.safetensors"), n=3, warmup=1, peak_memory=False)
    write_profile(measured, folder)
    return folder


@pytest.fixture(scope="module")
def page(trained: Path) -> Page:
    return make_page([trained])


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


class Reader(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_numbers_are_those_of_the_run(trained: Path, page: Page) -> None:
    rows = re.findall(
        r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', page.html.split('class="results"')[1].split("</table>")[0]
    )
    results = json.loads((trained / "results.json").read_text())
    assert [name for name, _ in rows] == [row["model"] for row in results]
    for (_, cells), row in zip(rows, results, strict=True):
        texts = re.findall(r"<td>(.*?)</td>", cells)
        assert f"{100 * row['macs_of_base']:.0f} % of base" in texts[0]
        assert texts[2] == f"{100 * row['last_accuracy']:.2f} %"
        assert texts[3] == f"{100 * row['best_accuracy']:.2f} %<small>epoch {row['best_epoch']}</small>"
        assert f"{row['model']}: {100 * row['last_accuracy']:.2f} %, " in page.html  # in the figure


@pytest.mark.parametrize("when_measured", [0.999, None])
def test_accuracies_beside_latencies_are_those_of_the_run(run: Path, when_measured: float | None) -> None:
    """A run may have been measured before it went on."""
    path = run / "last.profile.json"
    measured = json.loads(path.read_text())
    measured["rows"] = [row | {"accuracy": when_measured} for row in measured["rows"]]
    path.write_text(json.dumps(measured))
    drawn = make_page([run]).html
    for row in json.loads((run / "results.json").read_text()):
        assert re.search(rf"{row['model']}: {100 * row['last_accuracy']:.2f} %, [\d.]+ ms", drawn)
    assert "99.90 %" not in drawn


def test_every_part_is_there(trained: Path, page: Page) -> None:
    assert page.missing == ()
    headings = re.findall(r"<h2>(.*?)</h2>", page.html)
    assert headings == [
        *("Results", "The family", "Accuracy against MACs", "Accuracy against latency"),
        *("Test accuracy", "Training loss", "Some predictions", "Hardware and versions"),
    ]
    assert (trained / "recipe.toml").read_text() in html.unescape(page.html)
    info = json.loads((trained / "run.json").read_text())
    for fact in (info["device"], info["torch"], str(info["cpu_cores"])):
        assert fact in page.html
    assert page.html.count("data:image/png;base64,") == 12


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    reader = Reader(page.html)
    assert {"script", "link", "iframe", "object"}.isdisjoint(reader.tags)
    addresses = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "xlink:href")]
    assert addresses
    assert all(value.startswith("data:image/png;base64,") for value in addresses)
    assert "url(" not in page.html
    assert "@import" not in page.html
    assert "default-src 'none'" in page.html


def test_every_figure_has_a_title_and_a_description(page: Page) -> None:
    figures = re.findall(r'<svg class="(?:chart|bar)".*?</svg>', page.html, re.DOTALL)
    assert len(figures) == 4 + 3
    for figure in figures:
        assert re.search(r'role="img" aria-label="[^"]+".*?><title>[^<]+</title><desc>[^<]+</desc>', figure)
        assert "nan" not in figure


def test_right_and_wrong_are_told_by_more_than_colour(page: Page) -> None:
    answers = re.findall(
        r'class="answer (right|wrong)"><b aria-hidden="true">(.)</b><span class="hidden">(\w+):', page.html
    )
    assert len(answers) == 12 * 3
    assert set(answers) <= {("right", "✓", "right"), ("wrong", "✗", "wrong")}
    assert len(set(answers)) == 2


def test_bars_are_as_wide_as_their_macs(trained: Path, page: Page) -> None:
    plan = read_run(trained).net.plan
    bars = re.findall(r'<svg class="bar".*?</svg>', page.html, re.DOTALL)
    for bar, model in zip(bars, plan.models, strict=True):
        width = sum(float(w) for w in re.findall(r'width="([\d.]+)"', bar))
        assert width == pytest.approx(1000 * model.macs / plan.models[0].macs, abs=0.05)


def test_hostile_names_are_text(run: Path) -> None:
    net = detachnet.load(run / "last.safetensors")
    assert net.facts.data is not None
    net.facts = net.facts.updated(data=net.facts.data.model_copy(update={"classes": (HOSTILE,) * 10}))
    detachnet.save(net, run / "last.safetensors")
    hostile = run.rename(run.with_name(HOSTILE.replace("/", "")))
    recipe_file = hostile / "recipe.toml"
    description = f"description = '''{HOSTILE}'''"
    recipe_file.write_text(re.sub(r'description = ".*"', lambda _: description, recipe_file.read_text(), count=1))
    reader = Reader(make_page([hostile]).html)
    assert "script" not in reader.tags
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    text = "".join(reader.text)
    assert hostile.name in text
    assert text.count(HOSTILE) >= 12 * 3 + 2


@pytest.mark.parametrize(
    ("gone", "heading", "sentence"),
    [
        ("last.profile.json", "<h2>Accuracy against latency", "Latency was not measured"),
        ("run.json", ">device</th>", "There is no run.json"),
        ("metrics.jsonl", "<h2>Results", "No epoch is complete yet"),
    ],
)
def test_what_is_missing_is_said(run: Path, gone: str, heading: str, sentence: str) -> None:
    (run / gone).unlink()
    page = make_page([run])
    assert heading not in page.html
    assert sentence in page.html
    assert [sentence in missing for missing in page.missing] == [True]
    assert page.missing[0].startswith("run: ")


def test_data_that_is_not_here_is_said(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DETACHNET_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace('name = "cifar10-mini"', 'name = "mnist"'))
    page = make_page([run])
    assert page.missing == ("run: No predictions: mnist is not on this machine.",)
    assert "Some predictions" not in page.html


def test_several_runs_share_a_figure(trained: Path, run: Path) -> None:
    page = make_page([trained, run]).html
    together = page.split("All runs: accuracy against MACs")[1].split("</section>")[0]
    for model in ("base", "sub0", "sub1"):
        assert together.count(f"<title>{model}: ") == 2
    assert re.findall(r"</svg>(\w+)</li>", together) == ["tiny", "run"]
    assert re.findall(r"<h1>(.*?)</h1>", page) == ["2 runs", "tiny", "run"]
    assert f"<h1>{trained}</h1>" in make_page([trained, trained]).html


def test_damaged_runs_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(detachnet.CheckpointError, match=r"there is no run in .*nothing\n  try +give the folder"):
        make_page([tmp_path / "nothing"])
    (run / "metrics.jsonl").write_text("{")
    with pytest.raises(detachnet.CheckpointError, match=r"metrics\.jsonl is damaged\n  what"):
        make_page([run])
    (run / "metrics.jsonl").unlink()
    (run / "last.safetensors").unlink()
    with pytest.raises(detachnet.CheckpointError, match=r"it has no last\.safetensors"):
        make_page([run])


def test_the_command(trained: Path, page: Page, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(trained), "-o", str(out)])
    assert result.exit_code == 0
    assert re.fullmatch(r".*page\.html: \d+ kB, needs no other file and no network\n", result.stdout)
    assert out.read_text(encoding="utf-8") == page.html
    result = CliRunner().invoke(app, ["report", str(trained), "-o", str(tmp_path / "no" / "page.html")])
    assert (result.exit_code, "Error: cannot write" in result.stderr) == (2, True)
    result = CliRunner().invoke(app, ["report", "gone", "-o", str(tmp_path / "no" / "page.html")])  # said first
    assert (result.exit_code, "Error: cannot write" in result.stderr) == (2, True)
    result = CliRunner().invoke(app, ["report", str(trained), "-o", str(trained / "last.safetensors")])
    assert result.exit_code == 2
    assert "is no name for a page" in result.output
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (result.exit_code, "Error: there is no run in" in result.stderr) == (2, True)


LOOK = """
<!doctype html><pre id="seen"></pre><iframe width="375" height="800" srcdoc="PAGE"></iframe>
<script>
document.querySelector("iframe").onload = (event) => {
  const page = event.target.contentDocument, root = page.documentElement;
  const boxes = [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
  document.getElementById("seen").textContent = JSON.stringify({
    width: root.clientWidth,
    needed: root.scrollWidth,
    figures: boxes.filter((box) => box.width > 0 && box.height > 0 && box.right <= 375).length,
    pictures: [...page.images].filter((image) => image.complete && image.naturalWidth > 0).length,
    fetched: event.target.contentWindow.performance.getEntriesByType("resource")
      .map((entry) => entry.name).filter((name) => !name.startsWith("data:")),
  });
};
</script>
"""


def look(page: str, folder: Path) -> dict[str, object]:
    """What a browser 375 pixels wide makes of a page."""
    assert CHROMIUM is not None
    (folder / "look.html").write_text(LOOK.replace("PAGE", html.escape(page)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", (folder / "look.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="seen">(.+?)</pre>', dom)
    assert found is not None, dom[:500]
    seen: dict[str, object] = json.loads(html.unescape(found[1]))
    return seen


@pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on this machine (Debian: apt-get install chromium)"
)
def test_a_phone_shows_the_page_without_scrolling_sideways(trained: Path, run: Path, tmp_path: Path) -> None:
    long = run.rename(run.with_name("a_run_with_a_name_that_is_much_longer_than_a_phone_is_wide"))
    page = make_page([trained, long]).html
    seen = look(page, tmp_path)
    assert seen["width"] == 375 or seen["width"] == 360  # where scroll bars take room
    assert seen["needed"] == seen["width"]
    assert seen["figures"] == page.count("<svg")
    assert seen["pictures"] == page.count("<img")
    assert seen["fetched"] == []
