"""What is in an export folder, with checksums over all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from detachnet.deploy.formats import Format, Precision
from detachnet.deploy.measurement import Latency
from detachnet.errors import ExportError, nearest
from detachnet.fields import Fields, read_error
from detachnet.storage import MANIFEST, open_file, read_file
from detachnet.surgery.legs import Leg
from detachnet.text import parse_json

FILE_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.]{0,199}$")
_FileName = Annotated[str, Field(pattern=FILE_NAME.pattern)]
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Exported(Fields):
    refused_as = {"": ExportError}


class ExportedFile(_Exported):
    """A file of an export folder.

    Attributes:
        file: Its name in the folder.
        num_bytes: Its size.
        sha256: Checksum of its content, hexadecimal.
    """

    file: _FileName
    num_bytes: _Count
    sha256: str


class ExportedModel(_Exported):
    """One model of an export folder.

    Attributes:
        name: `base`, `sub0`, …
        file: Its graph's file in the folder; of `pte` the one with all models, as methods of their names.
        sha256: Checksum of that file, hexadecimal.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters.
        num_bytes: Bytes of its graph and of the weights it uses: what it takes alone; in `pte` of its tensors.
        accuracy: Test accuracy, in [0, 1], if it is known: of the trained model in float32 (also where weights are
            stored in float16), of this very file in int8.
        float_accuracy: That of the trained model on the same images, where `accuracy` is that of an int8 file.
        latency: As measured before the export; None if it was not.
    """

    name: str
    file: _FileName
    sha256: str
    macs: _Count
    num_params: _Count
    num_bytes: _Count
    accuracy: _Share | None = None
    float_accuracy: _Share | None = None
    latency: Latency | None = None

    @field_validator("latency")
    @classmethod
    def _seconds_of(cls, measured: Latency | None) -> Latency | None:
        """Of a whole measurement, its seconds: the rest is here already, or of the checkpoint."""
        return measured and Latency.model_validate(measured.model_dump(include=set(Latency.model_fields)))


class ExportedLeg(_Exported):
    """A part of the network between two places where models part, as a graph of its own.

    A model is its legs one behind the other: what one gives, the next one takes in. What a model computed at the
    end of a leg, any other model of the same leg can go on from.

    Attributes:
        models: Those that run it.
        start: The cut whose feature it takes in, under the name `feature`; empty for images.
        end: The cut whose feature it gives, under the name `feature_out`; empty for the output.
        macs: Multiply-accumulates for one image.
        file: Its graph's file in the folder.
        sha256: Checksum of that file, hexadecimal.
    """

    models: tuple[str, ...]
    start: str
    end: str
    macs: _Count
    file: _FileName
    sha256: str

    @property
    def leg(self) -> Leg:
        """Which one."""
        return Leg(self.models, self.start, self.end, self.macs)


class ImageInput(_Exported):
    """What every graph takes: float32 images `(B, *shape)`, of values `(pixel / 255 - mean) / std`.

    Attributes:
        name: Of the input.
        shape: Of one image, `(C, H, W)`.
        mean: Per channel; empty if the family does not know what it was trained on.
        std: Per channel.
        crop_pct: As in `DataInfo`.
        max_batch: The most images at once; None for any number.
    """

    name: str
    shape: tuple[_Positive, ...]
    mean: tuple[_Finite, ...] = ()
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    max_batch: _Positive | None = None


class Manifest(_Exported):
    """What is in an export folder.

    Attributes:
        format_version: Raised when the meaning of a folder changes.
        format: `onnx`, `pt2` or `pte`.
        precision: `float32`; `float16`, in which weights are stored and cast when a graph is loaded; or `int8`.
        models: The base-model first, if it is there.
        weights: The file that all graphs of `onnx` share; None where each model's file has its own.
        input: What every graph takes.
        output: Name of every graph's output, `(B, num_classes)`.
        labels: Name of each class; empty if they are not known.
        num_test: Number of test images that accuracies are measured on; 0 if that is not known.
        legs: What models share, and what each one has behind, if it was asked for; the base-model's first.
    """

    format_version: Literal[1] = 1
    format: Format
    precision: Precision
    models: Annotated[tuple[ExportedModel, ...], Field(min_length=1)]
    weights: ExportedFile | None
    input: ImageInput
    output: str
    labels: tuple[str, ...]
    num_test: _Count
    legs: tuple[ExportedLeg, ...] = ()

    @model_validator(mode="after")
    def _is_of_one_family(self) -> Manifest:
        """Every model once, legs of models that are there, a deviation for each mean."""
        if len(set(self.names)) < len(self.names):
            raise ValueError("a model is there twice")
        for leg in self.legs:
            if unknown := set(leg.models) - set(self.names) or (not leg.models and {""}):
                raise ValueError(f"a leg is of {sorted(unknown)[0]!r}, which is none of the models")
        if len(self.input.mean) != len(self.input.std):
            raise ValueError("input.mean and input.std are of different channels")
        return self

    @property
    def legs_of(self) -> dict[str, tuple[Leg, ...]]:
        """Model → its legs, front to back; where none were exported, the whole model is one."""
        whole = {model.name: Leg((model.name,), "", "", model.macs) for model in self.models}
        found = {name: tuple(part.leg for part in self.legs if name in part.models) for name in self.names}
        return {name: legs or (whole[name],) for name, legs in found.items()}

    def leg(self, leg: Leg) -> ExportedLeg:
        """The graph of a leg."""
        return next(part for part in self.legs if part.leg == leg)

    @property
    def names(self) -> tuple[str, ...]:
        """The models."""
        return tuple(model.name for model in self.models)

    def __getitem__(self, name: str) -> ExportedModel:
        if name not in self.names:
            raise ExportError(
                f"the folder has no model {name!r}",
                hint=f"the models are {', '.join(self.names)}",
                nearest=nearest(str(name), self.names),
            )
        return next(model for model in self.models if model.name == name)


def read_manifest(folder: str | Path) -> Manifest:
    """What is in an export folder, all files checked against their checksums.

    Raises:
        ExportError: There is no manifest, it is of an unknown version, or a file is missing or changed.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ExportError(f"{folder} is a file", hint="give the folder that it is in")
    manifest = _parse(folder / MANIFEST)
    files = {model.file: model.sha256 for model in manifest.models}
    files |= {leg.file: leg.sha256 for leg in manifest.legs}
    if manifest.weights is not None:
        files[manifest.weights.file] = manifest.weights.sha256
    for name, sha256 in files.items():
        try:
            content = exported_file(folder / name)
        except OSError as error:
            raise ExportError(f"{folder / name} cannot be read", what=str(error), hint="export again") from error
        if content.sha256 != sha256:
            raise ExportError(
                f"{folder / name} is damaged: its content does not match its checksum in {MANIFEST}",
                hint="copy the folder again, or export again",
            )
    return manifest


def _parse(path: Path) -> Manifest:
    """A manifest's file, checked."""
    fields: Any = None
    try:
        fields = parse_json(read_file(path))
        if (found := fields.get("format_version")) != 1:
            raise ExportError(
                f"{path} has format version {found}; this version of detachnet reads 1",
                hint="pip install --upgrade detachnet",
            )
        if fields.pop("sha256", None) != _digest(fields):
            raise ExportError(
                f"{path} is damaged: its content does not match its checksum", hint="copy the folder again"
            )
        return Manifest.model_validate_json(json.dumps(fields))
    except FileNotFoundError as error:
        raise ExportError(
            f"{path.parent} is no export folder: it has no {MANIFEST}",
            hint="detachnet export CHECKPOINT -o DIR makes one",
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{path} is no manifest of detachnet's", what=read_error(error, fields)) from error


def dump(manifest: Manifest) -> str:
    """A manifest as JSON, with a checksum over itself."""
    fields = manifest.model_dump(mode="json")
    return json.dumps(fields | {"sha256": _digest(fields)}, indent=1) + "\n"


def _digest(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def exported_file(path: Path) -> ExportedFile:
    """A file's name, size and checksum; safe on the disk when this returns."""
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with suppress(OSError):  # of a folder that is read only
            os.fsync(file.fileno())
        return ExportedFile(file=path.name, num_bytes=os.fstat(file.fileno()).st_size, sha256=digest)
