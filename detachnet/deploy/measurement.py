"""What one model costs on one machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from detachnet.errors import MeasurementError
from detachnet.fields import Fields
from detachnet.machine import MOST_THREADS

Runtime = Literal["torch", "onnx"]
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(gt=0)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Latency(Fields):
    """Measured seconds of one run: what an export folder says of a `Measurement`.

    Attributes:
        runtime: `torch`, or `onnx` for ONNX Runtime.
        device: Where it ran.
        batch: Images per run.
        threads: Threads of the CPU per run.
        n: Timed runs, alternating with those of the family's other models.
        p50_s: Median seconds of a run of `batch` images.
        p90_s: Nine of ten runs take no longer.
        p99_s: 99 of 100 runs take no longer.
    """

    refused_as = {"": MeasurementError}

    runtime: Runtime
    device: str
    batch: _Positive
    threads: Annotated[int, Field(gt=0, le=MOST_THREADS)]
    n: _Positive
    p50_s: _Seconds
    p90_s: _Seconds
    p99_s: _Seconds


class Measurement(Latency):
    """What one model of a family costs, as measured on one machine.

    Attributes:
        model: Its name.
        warmup: Runs before those that were timed.
        images_per_s: Images over the seconds of all timed runs.
        peak_memory_bytes: Memory that holding and running this model alone takes; None if it was not measured.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters when detached.
        num_bytes: Bytes of its parameters and buffers when detached.
        accuracy: Test accuracy, in [0, 1]; None if it is not known.
    """

    model: str
    warmup: _Count
    images_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    peak_memory_bytes: int | None
    macs: _Count
    num_params: _Count
    num_bytes: _Count
    accuracy: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None
