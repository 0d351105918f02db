"""DetachPlan: what a family will be, before anything is built. Frozen, printable, saveable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import computed_field, model_validator

from detachnet.errors import CutError, nearest
from detachnet.fields import Fields
from detachnet.surgery.figures import drawn
from detachnet.surgery.routes import (
    Filters,
    SubModel,
)
from detachnet.surgery.stepdown import (
    Stem,
    StepDown,
)
from detachnet.text import Table, by, si

BASE = "base"
Norm = Literal["private", "shared"]
Head = Literal["private", "shared"]
Cuts = Sequence[str] | Sequence[float] | Mapping[str, str | SubModel] | int | str


class PlannedSpan(Fields):
    """A part of the base-model that a sub-model leaves out.

    Attributes:
        start: It begins behind this cut; empty for the image.
        end: The last cut that is left out.
        prepared: Whether it begins where the image is prepared for the first layer with weights.
        bridge: What stands for it; None where both ends have the same shape, so that nothing does.
        begins: Multiply-accumulates of the base-model in front of it.
        ends: Multiply-accumulates of the base-model up to its end.
    """

    start: str = ""
    end: str
    prepared: bool = False
    bridge: StepDown | None = None
    begins: int = 0
    ends: int = 0

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


class ModelPlan(Fields):
    """One model of a family.

    Attributes:
        name: `base`, `sub0`, `sub1`, …, or the user's own name.
        spans: What it leaves out, front to back; nothing for the base-model.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters when detached.
        shared_macs: Multiply-accumulates in front of where it parts from the base-model, which run once for both.
        own_params: Number of parameters that are not the base-model's: bridges, private norms and head; counted
            when the family is made.
        width: The share of the filters that was asked for, of all groups or by name; 1 for all of them.
        filters: Which were asked for.
        kept: Group of filters → how many of its units there are, the first; or which, as the bits of a hexadecimal
            number, the first unit the lowest. All of those that are not named.
    """

    name: str
    spans: tuple[PlannedSpan, ...] = ()
    macs: int
    num_params: int
    shared_macs: int = 0
    own_params: int = 0
    width: float | dict[str, float] = 1.0
    filters: Filters = "first"
    kept: dict[str, int | str] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_a_cut(cls, fields: Any) -> Any:
        """Plans of before there were spans say `cut` and `stepdown`."""
        if not isinstance(fields, dict) or "cut" not in fields:
            return fields
        rest = {key: value for key, value in fields.items() if key not in ("cut", "stepdown")}
        if "spans" in rest:
            return rest
        spans = [] if fields["cut"] is None else [{"end": fields["cut"], "bridge": fields.get("stepdown")}]
        return rest | {"spans": spans}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cut(self) -> str | None:
        """Everything up to and including this node is dropped; None if the front is not."""
        first = self.spans[0] if self.spans else None
        return first.end if first and (not first.start or first.prepared) else None

    @property
    def stepdown(self) -> StepDown | None:
        """The layer the image enters through instead of the front; None if that is not dropped."""
        return self.spans[0].bridge if self.cut is not None else None

    @property
    def is_cut(self) -> bool:
        """Whether the front is all that it leaves out."""
        return self.cut is not None and len(self.spans) == 1 and not self.kept

    @property
    def asked(self) -> SubModel:
        """What `make_detachable` makes the same model of."""
        spans = [str(span) for span in self.spans]
        return SubModel(drop=spans, width=self.width, filters=self.filters).keeping(self.kept)

    @property
    def width_text(self) -> str:
        """Its width as tables show it; empty for all filters."""
        if not self.kept:
            return ""
        groups = self.width if isinstance(self.width, dict) else {}
        first = next(iter(groups.items()), ("", self.width))
        shown = f"{first[0]} {first[1]:g}".strip()
        more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
        return shown + more + (f", {self.filters}" if self.filters != "first" else "")


class DetachPlan(Fields):
    """A family: the base-model and its sub-models, in the order of their cuts through the network.

    Attributes:
        model: Class of the base-model.
        input_size: Shape of one image, `(C, H, W)`.
        norm: `private` (each sub-model has its own batch norms) or `shared` (the paper's).
        head: The same of the last layer with weights, which makes the output.
        models: The base-model first.
        hints: What is legal but worth a second thought.
        joint_macs: Multiply-accumulates for one image of all models in one pass, where what they share runs once.
        whole: Path of a module that is kept whole for what its forward does → what that is.
        checked: What was not compared with the model, and what was found to join the images of a batch; empty
            where everything was compared and nothing found.
    """

    model: str
    input_size: tuple[int, ...]
    norm: Norm
    models: tuple[ModelPlan, ...]
    hints: tuple[str, ...] = ()
    head: Head = "shared"
    joint_macs: int = 0
    checked: str = ""
    whole: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """`("base", "sub0", …)`."""
        return tuple(model.name for model in self.models)

    def __getitem__(self, name: str) -> ModelPlan:
        if name not in self.names:
            known = ", ".join(self.names)
            raise CutError(
                f"the plan has no model {name!r}",
                hint=f"the models are {known}",
                nearest=nearest(str(name), self.names),
            )
        return next(model for model in self.models if model.name == name)

    @property
    def is_narrow(self) -> bool:
        """Whether a model has fewer filters than the base-model."""
        return any(model.kept for model in self.models)

    @property
    def entry(self) -> str | Stem:
        """What `stepdown=` was when the family was made; flat features get a linear layer whatever that was."""
        bridges = [span.bridge for model in self.models for span in model.spans if span.bridge]
        if any(bridge.kind == "custom" for bridge in bridges):
            return "custom"
        entries = [model.stepdown for model in self.models if model.stepdown and model.stepdown.kind != "linear"]
        return next((entry.stem or entry.kind for entry in entries), "conv")

    @property
    def title(self) -> str:
        """The heading of the table."""
        size = "×".join(map(str, self.input_size))
        heads = ", private heads" if self.head == "private" else ""
        return f"{self.model} on {size} images, {self.norm} batch norms{heads}"

    @property
    def table(self) -> Table:
        """One row per model."""
        front_only = all(model.is_cut for model in self.models[1:])
        header: tuple[str, ...] = (
            "model",
            "left out",
            "bridges",
            "MACs",
            "of base",
            "shared",
            "parameters",
            "own",
        )
        if self.is_narrow:
            header = (*header[:2], "width", *header[2:])
        if front_only:
            header = ("model", "cut", "feature", "step-down", "MACs", "of base", "parameters")
        rows = tuple(self._front(model) if front_only else self._route(model) for model in self.models)
        hints = [f"hint: {hint}" for hint in self.hints]
        checked = [f"checked: {self.checked}"] if self.checked else []
        whole = [f"kept whole: {self._whole}"] if self.whole else []
        return Table(header, rows, self.title, (*whole, *hints, *checked), left=header.index("MACs"))

    @property
    def _whole(self) -> str:
        """What is kept whole and why."""
        said = [f"{path!r} ({why})" for path, why in self.whole.items()]
        return ", ".join(said[:6]) + (f" and {len(said) - 6} more" if len(said) > 6 else "")

    def _front(self, model: ModelPlan) -> tuple[str, ...]:
        """A row of a family whose sub-models drop the front."""
        entry = model.stepdown
        feature, text = (by(entry.feature), str(entry)) if entry else ("", "")
        return (model.name, model.cut or "", feature, text, *self._costs(model), si(model.num_params))

    def _route(self, model: ModelPlan) -> tuple[str, ...]:
        """A row of a family with other routes."""
        spans = ", ".join(map(str, model.spans))
        bridges = ", ".join("–" if span.bridge is None else str(span.bridge) for span in model.spans)
        width = (model.width_text,) if self.is_narrow else ()
        is_sub = bool(model.spans or model.kept)
        shared, own = (si(model.shared_macs), si(model.own_params)) if is_sub else ("", "")
        return (model.name, spans, *width, bridges, *self._costs(model), shared, si(model.num_params), own)

    def _costs(self, model: ModelPlan) -> tuple[str, str]:
        """Multiply-accumulates, and their share of the base-model's."""
        return si(model.macs), f"{100 * model.macs / max(1, self.models[0].macs):.0f} %"

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(drawn(self))
