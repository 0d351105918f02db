"""plan -> the bars of a family as inline SVG, in colours of the page around; table and bars for a notebook."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup

from detachnet.text import by

if TYPE_CHECKING:
    from detachnet.surgery.plan import DetachPlan, ModelPlan, PlannedSpan

SHADES = 6
"""Number of shades of layers the page's style knows; a seventh looks like the first."""


def bar(plan: DetachPlan, model: ModelPlan) -> Markup:
    """One model of a family: its layers from the image to the output, as wide as their share of the MACs.

    A span that a model leaves out is a gap; what stands for it ends where the span does.
    """
    base = plan.models[0].macs
    spans = [span for m in plan.models for span in m.spans]
    left = min([0, *(span.ends - span.bridge.macs for span in spans if span.bridge)])
    unit = 1000 / max(1, base - left)

    def at(macs: float) -> float:
        return (macs - left) * unit

    edges = sorted({0, base, *(edge for span in spans for edge in (span.begins, span.ends))})
    parts = [
        _rectangle(at(start), at(end), f"shared t{i % SHADES}")
        for i, (start, end) in enumerate(pairwise(edges))
        if not any(span.begins <= start < span.ends for span in model.spans)
    ]
    for span in model.spans:
        if span.bridge is not None:
            parts.append(_rectangle(at(span.ends - span.bridge.macs), at(span.ends), "stepdown"))
    parts += [Markup('<path class="cut" d="M{0:.2f} 0V40"/>').format(at(edge)) for edge in edges[1:-1]]
    words = _bar_title(model), _bar_description(model, base)
    return svg(*words, "bar", (1000, 40), Markup("").join(parts), ' preserveAspectRatio="none"')


_STYLE = Markup("""<style>
.detachnet { font: 13px/1.5 system-ui, sans-serif; overflow-x: auto; }
.detachnet table, .detachnet th, .detachnet td { color: inherit; font: inherit; }
.detachnet table { border-collapse: collapse; margin: .3em 0; width: auto; font-variant-numeric: tabular-nums; }
.detachnet th, .detachnet td { padding: .15em .6em; text-align: right; white-space: nowrap;
  border: 0; border-bottom: 1px solid #8886; background: none; }
.detachnet thead th { font-weight: 600; opacity: .75; }
.detachnet .left { text-align: left; white-space: normal; }
.detachnet .name { display: inline-block; width: 6em; overflow: hidden; text-overflow: ellipsis; }
.detachnet .row { display: flex; align-items: center; max-width: 60em; }
.detachnet .bar { flex: 1; height: 1.4em; }
.detachnet .t0 { fill: #8fb4dd; } .detachnet .t1 { fill: #6f9fd3; } .detachnet .t2 { fill: #4f8ac9; }
.detachnet .t3 { fill: #3d78b8; } .detachnet .t4 { fill: #34699f; } .detachnet .t5 { fill: #2f5c8c; }
.detachnet .stepdown { fill: #d9722a; stroke: #d9722a; stroke-width: 3; vector-effect: non-scaling-stroke; }
.detachnet .cut { stroke: #777c84; stroke-width: 1.5; stroke-dasharray: 3 3; fill: none;
  vector-effect: non-scaling-stroke; }
</style>""")
"""Colours that can be read on white and on black; texts have the notebook's."""


def drawn(plan: DetachPlan) -> Markup:
    """A plan as a notebook shows it: its table, and the bars of its models."""
    table = plan.table
    left = [' class="left"' if i < table.left else "" for i in range(len(table.header))]

    def cells(tag: str, row: tuple[str, ...]) -> Markup:
        pairs = zip(left, row, strict=True)
        one = Markup("<{0}{1}>{2}</{0}>")
        return Markup("<tr>{}</tr>").format(
            Markup("").join(one.format(Markup(tag), Markup(where), text) for where, text in pairs)
        )

    rows = Markup("").join(cells("td", row) for row in table.rows)
    bars = Markup("").join(
        Markup('<div class="row"><span class="name">{}</span>{}</div>').format(model.name, bar(plan, model))
        for model in plan.models
    )
    notes = Markup("").join(Markup("<div>{}</div>").format(line) for line in table.notes)
    return Markup(
        '{}<div class="detachnet"><strong>{}</strong><table><thead>{}</thead><tbody>{}</tbody></table>{}{}</div>'
    ).format(_STYLE, table.title, cells("th", table.header), rows, bars, notes)


def _bar_title(model: ModelPlan) -> str:
    return f"{model.name}: {model.macs / 1e6:,.2f} million MACs"


def _bar_description(model: ModelPlan, base: int) -> str:
    share = f"{100 * model.macs / max(1, base):.0f} % of the base-model"
    return (
        f"{describe_route(model)[:1].upper()}{describe_route(model)[1:]}; {share}."
        if model.spans or model.kept
        else ("The whole network, from the image to the output.")
    )


def describe_route(model: ModelPlan) -> str:
    """What a model leaves out and what stands for it, in words."""
    if not model.spans and not model.kept:
        return "the whole network"
    narrow = [f"has some of the filters ({model.width_text})"] if model.kept else []
    return "; ".join([*narrow, *(_describe_span(span) for span in model.spans)])


def _describe_span(span: PlannedSpan) -> str:
    bridge = span.bridge
    if not span.start and bridge is not None:
        made = by(bridge.feature)
        return f"enters behind {span.end} through its step-down ({bridge}), which makes {made} of the image"
    stands = "nothing stands for it" if bridge is None else f"a bridge ({bridge}) stands for it"
    return f"leaves out what is behind {span.start} up to {span.end}, and {stands}"


def _rectangle(left: float, right: float, style: str) -> Markup:
    return Markup('<rect class="{}" x="{:.2f}" y="4" width="{:.2f}" height="32"/>').format(
        style, left, right - left
    )


def svg(
    title: str, description: str, style: str, size: tuple[float, float], inside: Markup, more: str = ""
) -> Markup:
    """A drawing with a title and a description for screen readers; `more` attributes as they are."""
    box = Markup('viewBox="0 0 {:g} {:g}"{}').format(*size, Markup(more))
    words = Markup('role="img" aria-label="{0}: {1}"><title>{0}</title><desc>{1}</desc>').format(
        title, description
    )
    return Markup('<svg class="{}" {} {}{}</svg>').format(style, box, words, inside)
