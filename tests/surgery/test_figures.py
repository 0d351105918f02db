from html.parser import HTMLParser

import detachnet
from detachnet.surgery.plan import DetachPlan


def plan() -> DetachPlan:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    subs = {"front": "features.6", "late": detachnet.SubModel(drop=["features.26:features.32"])}
    return detachnet.make_detachable(model, subs, check="none").plan


class Reader(HTMLParser):
    """Checks that tags close, and keeps the texts of cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Nothing is inside."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_a_notebook_shows_table_and_diagram() -> None:
    made = plan()
    page = made._repr_html_()
    table = made.table
    wanted = [cell for row in (table.header, *table.rows) for cell in row if cell]
    assert Reader(page).cells == wanted
    assert page.count('<svg class="bar"') == 3
    assert "<script" not in page
    for line in table.notes:
        assert line.partition(":")[2].strip()[:20] in page


def test_a_family_shows_its_plan() -> None:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(model, ["features.6"], check="none")
    assert net._repr_html_() == net.plan._repr_html_()


def test_names_in_a_diagram_are_text() -> None:
    made = plan().model_copy(update={"model": "<script>", "hints": ("<b>",)})
    assert "<script" not in made._repr_html_()
    assert "&lt;b&gt;" in made._repr_html_()
