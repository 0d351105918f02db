"""The figures and tables of README and docs are made from what is committed."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_figure_is_drawn_anew(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "scripts" / "figures.py"))["main"](["--out", str(tmp_path / "new")])
    drawn = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert drawn == ["approaches.svg", "converged.svg", "latency.svg", "results.svg", "study.svg"]
    for name in drawn:  # texts and their order; places differ by a digit between versions of matplotlib
        new, kept = (
            re.findall(r"<text[^>]*>([^<]+)</text>", (at / name).read_text())
            for at in (tmp_path / "new", ROOT / "docs")
        )
        assert new == kept
        assert new


def test_every_table_is_written_anew() -> None:
    tables = runpy.run_path(str(ROOT / "scripts" / "tables.py"))
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in tables["PAGES"]]
    assert sorted(re.findall(r"<!-- table: (.+) -->", "".join(pages))) == sorted(tables["TABLES"])
    for page in pages:
        assert tables["renewed"](page) == page
        altered = re.sub(r"(<!-- table: .+ -->\n\n(?:\|.*\n)*?.*?)\d\.\d", r"\1x", page)
        assert altered != page
        assert tables["renewed"](altered) == page
        without = re.sub(r"(<!-- table: .+ -->\n\n)(?:\|.*\n)+\n", r"\1", page)
        assert tables["renewed"](without) == page
