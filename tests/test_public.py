import re
from pathlib import Path

import pytest

import detachnet

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_public_names_are_sorted_and_exist() -> None:
    assert detachnet.__all__ == sorted(detachnet.__all__)
    for name in detachnet.__all__:
        assert getattr(detachnet, name).__doc__
    with pytest.raises(AttributeError, match=r"attribute '?nothing"):
        detachnet.nothing  # noqa: B018


def test_public_objects_name_their_home() -> None:
    for name in detachnet.__all__:
        assert getattr(detachnet, name).__module__.startswith("detachnet.")


def examples() -> list[tuple[str, str, str]]:
    """Python examples of the pages, each with the text block right behind it: what it prints."""
    found = []
    for page in PAGES:
        for match in re.finditer(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", page.read_text(), re.DOTALL):
            found.append((page.name, match[1], match[2] or ""))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code", "printed"), examples())
def test_every_example_runs_and_prints_what_the_page_says(
    page: str,
    code: str,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    out = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    assert out == [line.rstrip() for line in printed.strip().splitlines()]


def test_links_in_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
