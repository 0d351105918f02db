"""A trained family on a device: choose a model by a budget, and run it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from torch import Tensor, nn

from detachnet.checkpoint.loading import load_family
from detachnet.data.images import read_image, to_tensor
from detachnet.deploy.backends import Backend, OnnxBackend, TorchBackend
from detachnet.deploy.budget import ModelCosts, check, choose
from detachnet.deploy.measurement import Measurement
from detachnet.deploy.profile import Profile, check_profile, read_profile
from detachnet.errors import BudgetError, CutError, DataError, MeasurementError, nearest
from detachnet.machine import find_device, hardware
from detachnet.storage import locate
from detachnet.surgery.legs import Leg
from detachnet.surgery.stepdown import StepDownBuilder
from detachnet.surgery.tracer import Leaves
from detachnet.text import by

logger = logging.getLogger("detachnet")
Picture = Tensor | Image.Image | str | Path | BinaryIO


class Answer(NamedTuple):
    """What a model said.

    Attributes:
        model: Which one.
        output: `(num_classes,)` for one image, `(B, num_classes)` for a batch.
    """

    model: str
    output: Tensor


class Family:
    """All models of a family, in memory once, and what each was measured to cost here.

    It runs as it was measured: with as many threads as its profile.

    Args:
        backend: The models.
        path: Where they came from; errors name it.
        measured: The profile, if there is one.

    Attributes:
        names: The models, the base-model first.
        input_size: Shape of one image, `(C, H, W)`.
        data: What it was trained on, if that is known: class names and normalization.
        profile: What was measured; None if nothing was.
        accuracy: Model → test accuracy, in [0, 1]; without the models of which it is not known.
        macs: Model → multiply-accumulates for one image.
    """

    def __init__(self, backend: Backend, path: str | Path, measured: Profile | None) -> None:
        self.path, self.profile = Path(path), measured
        self.names, self.input_size, self.data = backend.names, backend.input_size, backend.data
        self._backend = backend
        is_of_the_zoo = not isinstance(backend, TorchBackend) or backend.net.source is not None
        self._model_file = "" if is_of_the_zoo else " --model-file FILE.py:FUNCTION"
        costs = [backend.costs(name) for name in backend.names]
        self.macs = {cost.model: cost.macs for cost in costs}
        self.accuracy = {cost.model: cost.accuracy for cost in costs if cost.accuracy is not None}
        if measured is not None:
            check_profile(measured, {cost.model: cost.macs for cost in costs}, path)
            _compare_machines(measured, backend, path)

    def __repr__(self) -> str:
        return f"Family({str(self.path)!r}, names={list(self.names)})"

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module | None = None,
        device: str = "cpu",
        *,
        shared_memory: bool = False,
        stepdown: StepDownBuilder | None = None,
        leaf_modules: Sequence[type[nn.Module] | str] = (),
        leaf_functions: Sequence[Callable[..., Any]] = (),
    ) -> Family:
        """Read a checkpoint or an export folder, and the profile that belongs to it.

        Args:
            path: A family's file or the folder of a run (torch), or a folder that `export` wrote (ONNX Runtime).
            model: A user's own architecture, as `detachnet.load` takes it.
            device: `cpu` or `cuda`; an export folder runs on the CPU.
            shared_memory: Have the weights of an export folder in memory once, whatever number of its models runs
                (in torch that is always so). The first call optimizes its graphs for this processor, compares them
                and keeps them in the user's cache folder, `$XDG_CACHE_HOME/detachnet` or `~/.cache/detachnet`;
                later ones map the weights from there.
            stepdown: Of a family's file, as `detachnet.load` takes it; so the next two.
            leaf_modules: As given to `make_detachable`.
            leaf_functions: As given to `make_detachable`.

        Raises:
            CheckpointError: The file is missing or damaged.
            ExportError: The folder is damaged or not of ONNX graphs, or ONNX Runtime is not installed.
            MeasurementError: The profile is damaged or of another family, or there is no such device.
        """
        place = locate(path)
        measured = read_profile(place.path)
        threads = measured.rows[0].threads if measured else None
        if not place.is_export:
            net = load_family(place.path, model, stepdown, Leaves.given(leaf_modules, leaf_functions))
            net = net.to(find_device(device))
            return cls(TorchBackend(net, threads), place.path, measured)
        if device != "cpu":
            raise MeasurementError(f"the ONNX graphs of {path} run on the CPU here, not on {device}")
        return cls(OnnxBackend(place.path, threads, shared_memory=shared_memory), place.path, measured)

    def choose(
        self,
        latency_ms: float | None = None,
        macs: float | None = None,
        memory_mb: float | None = None,
        accuracy: float | None = None,
    ) -> str:
        """The most accurate model within the budgets; given only an accuracy, the fastest model that reaches it.

        Args:
            latency_ms: At most so many milliseconds for one image in nine of ten runs, as `detachnet profile`
                measured them.
            macs: At most so many multiply-accumulates for one image.
            memory_mb: At most so much peak memory as measured, in 10^6 bytes.
            accuracy: At least this test accuracy, in [0, 1].

        Returns:
            The model's name; without any budget that of the most accurate model.

        Raises:
            BudgetError: No model keeps the budgets; the message names the nearest and its figures.
            MeasurementError: What the choice needs was not measured.
        """
        given = {"latency_ms": latency_ms, "macs": macs, "memory_mb": memory_mb, "accuracy": accuracy}
        limits = {name: value for name, value in given.items() if value is not None}
        check(limits)
        accuracy_of = self.known_accuracy()
        needs_latency = latency_ms is not None or set(limits) == {"accuracy"}
        return choose([self._costs_of(n, needs_latency, memory_mb is not None) for n in accuracy_of], limits)

    def known_accuracy(self) -> dict[str, float]:
        """`accuracy`, where it is known of a model.

        Raises:
            MeasurementError: It is of none, with what measures it.
        """
        if self.accuracy:
            return self.accuracy
        said = f"{self.path} does not say how accurate its models are"
        if self.data is None:
            raise MeasurementError(
                said, hint="net.facts = net.facts.updated(accuracy={'base': 0.9, …}), then save"
            )
        is_export = self.path.is_dir()
        family, new = "RUN" if is_export else self.path, f"measured.safetensors{self._model_file}"
        then = f"export {new} -o measured" if is_export else f"profile {new}"
        raise MeasurementError(
            said,
            what="they were not measured on test images; a training with data.holdout measures on others",
            hint=f"detachnet evaluate {family} -o {new} && detachnet {then}",
        )

    def run(self, image: Picture, model: str | None = None, budget_ms: float | None = None) -> Answer:
        """Run one model.

        Args:
            image: Normalized images, `(C, H, W)` or `(B, C, H, W)`; or a picture or its file, of any size.
            model: Which one; the base-model if neither is given.
            budget_ms: Or: the one `choose(latency_ms=budget_ms)` finds.

        Raises:
            BudgetError: No model is fast enough, or both arguments are given.
            CutError: No model has that name.
            DataError: The image is broken, not finite or has another size.
            MeasurementError: There are no latencies to choose by.
        """
        if model is not None and budget_ms is not None:
            raise BudgetError(f"run the model {model!r}, or what a budget of {budget_ms} ms allows; not both")
        name = model or (self.names[0] if budget_ms is None else self.choose(latency_ms=budget_ms))
        images = self._images(image)
        single = images.ndim == len(self.input_size)
        batch = self._backend.prepare(images[None] if single else images)
        output = self._backend.run(self._known(name), batch)
        return Answer(name, output[0] if single else output)

    def resumable(self, image: Picture) -> Resumable:
        """Images for several models, each of which goes on from where another one parted.

        Args:
            image: As `run` takes it.

        Raises:
            DataError: The image is broken, not finite or has another size.

        Examples:
            >>> work = family.resumable(images)
            >>> small = work.run("small")
            >>> base = work.run("base")  # only what is behind the parting
        """
        images = self._images(image)
        is_single = images.ndim == len(self.input_size)
        batch = self._backend.prepare(images[None] if is_single else images)
        return Resumable(self._backend, batch, is_single=is_single)

    def latency_s(self, model: str) -> tuple[float, float]:
        """Median and 99th percentile of a model's measured seconds for one image.

        Raises:
            MeasurementError: They were not measured on this device, or of several images per run.
        """
        row = self._of_one_image(self._known(model))
        return row.p50_s, row.p99_s

    def _of_one_image(self, name: str) -> Measurement:
        """A model's row of the profile, if its runs were of one image."""
        row = self._measured()[name]
        if row.batch != 1:
            raise MeasurementError(
                f"{self.path} was measured on {row.batch} images at once; what one takes is not known",
                hint=f"{self._command} --batch 1",
            )
        return row

    @property
    def _command(self) -> str:
        """What measures the family on this device."""
        device = self._backend.device.type
        where = "" if device == "cpu" else f" --device {device}"
        return f"detachnet profile {self.path}{self._model_file}{where}"

    def _measured(self) -> Profile:
        """The profile, if it is of this device."""
        device = self._backend.device.type
        if self.profile is None:
            raise MeasurementError(f"{self.path} was not measured on a device yet", hint=self._command)
        measured = self.profile.rows[0].device.partition(":")[0]
        if measured != device:
            raise MeasurementError(
                f"{self.path} runs on {device}, but was measured on {measured}", hint=self._command
            )
        return self.profile

    def _costs_of(self, name: str, latency: bool, memory: bool) -> ModelCosts:
        row = self._of_one_image(name) if latency else self._measured()[name] if memory else None
        if row is not None and memory and row.peak_memory_bytes is None:
            how = self.profile.memory if self.profile else ""
            raise MeasurementError(f"{self.path} was measured without its peak memory", what=how)
        return ModelCosts(
            name,
            self.accuracy[name],
            self.macs[name],
            1e3 * row.p90_s if row else None,
            row.peak_memory_bytes / 1e6 if row and row.peak_memory_bytes is not None else None,
        )

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise CutError(
                f"no model is called {name!r}",
                hint=f"the models are {', '.join(self.names)}",
                nearest=nearest(name, self.names),
            )
        return name

    def _images(self, image: Picture) -> Tensor:
        """Normalized images, `(C, H, W)` or `(B, C, H, W)`."""
        if not isinstance(image, Tensor):
            if self.data is None:
                raise DataError(
                    f"{self.path} does not say how pictures are normalized", hint="give a normalized tensor"
                )
            if not (isinstance(image, str | Path | Image.Image) or hasattr(image, "read")):
                raise DataError(
                    f"an image is a normalized tensor, a picture or its file, not a {type(image).__name__}",
                    hint="of an array: Image.fromarray(array) of pixels, torch.from_numpy(array) if normalized",
                )
            return to_tensor(read_image(image), self.data, self.input_size)
        image = image.detach()
        if tuple(image.shape[-len(self.input_size) :]) != self.input_size or image.ndim > 1 + len(self.input_size):
            raise DataError(
                f"the family takes images {by(self.input_size)} or batches of them, not {by(tuple(image.shape))}"
            )
        if not image.is_floating_point():
            raise DataError(
                f"the family takes normalized images, not {str(image.dtype).removeprefix('torch.')} pixels",
                hint="give the picture or its file, or normalize: (pixel / 255 - mean) / std",
            )
        # The sum takes less time, and is finite where all pixels are, unless they are huge.
        if not math.isfinite(image.sum()) and not (finite := image.isfinite()).all():
            raise DataError(
                f"the image holds {float(image[~finite][0])}: no model has an answer to it",
                hint="look for a division by zero, or a sensor that gave nothing",
            )
        return image


class Resumable:
    """A batch of images on its way through models of a family; what models share is computed once.

    Attributes:
        is_single: Whether this is one image without an axis for the batch.
        macs: Multiply-accumulates spent so far, on all images.
    """

    def __init__(
        self,
        backend: Backend,
        images: Tensor,
        features: Mapping[Leg, Tensor] | None = None,
        *,
        is_single: bool = False,
    ) -> None:
        self._backend, self._images, self._features = backend, images, dict(features or {})
        self.is_single = is_single
        self.macs = 0

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._images)

    def run(self, model: str) -> Answer:
        """The output of a model, from the last feature that another one has computed.

        Raises:
            CutError: No model has that name.
        """
        if model not in self._backend.legs:
            raise CutError(
                f"no model is called {model!r}", hint=f"the models are {', '.join(self._backend.names)}"
            )
        legs = self._backend.legs[model]
        done = sum(leg in self._features for leg in legs)
        value = self._features[legs[done - 1]] if done else self._images
        for leg in legs[done:]:
            value = self._backend.run_leg(leg, value) if len(legs) > 1 else self._backend.run(model, value)
            self.macs += len(self._images) * leg.macs
            if leg.end:
                self._features[leg] = value
        return Answer(model, value[0] if self.is_single else value)

    def select(self, which: Tensor) -> Resumable:
        """Some of the images, with what is known of them.

        Args:
            which: Of each image whether it is taken, `(B,)`, bool.

        Raises:
            DataError: It is a single image, without a batch.
        """
        if self.is_single:
            raise DataError("a single image has no others to select it from", hint="resumable(image[None])")
        which = which.to(self._images.device)
        features = {leg: value[which] for leg, value in self._features.items()}
        return Resumable(self._backend, self._images[which], features)


def _compare_machines(measured: Profile, backend: Backend, path: str | Path) -> None:
    """Say so where a family runs on another processor than it was measured on."""
    there, here = measured.hardware["device"], hardware(backend.device)["device"]
    if measured.rows[0].device.partition(":")[0] == backend.device.type and there != here:
        logger.warning("%s was measured on %s, but runs on %s", path, there, here)
