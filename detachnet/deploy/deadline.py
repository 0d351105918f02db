"""requests + a deadline -> answers in time, from the most accurate model that the load allows."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import torch
from PIL.Image import Image
from torch import Tensor, nn

from detachnet.deploy.family import Family, Picture
from detachnet.deploy.rests import measure_rests
from detachnet.errors import BudgetError, DetachNetError, LateError, MeasurementError

logger = logging.getLogger("detachnet")
HOLD = 25
"""Requests in a row for which a more accurate model must have had room before it is taken."""
ROOM = 0.7
"""What share of the target such a model may need for that."""
WEIGHT = 1 / 32
"""Of a new observation in the moving estimates."""
DEVIATIONS = 4
"""Mean deviations above the mean that stand for the slowest run in a hundred."""


class LoadPolicy:
    """Decides which model answers the next request; knows no clock and runs nothing.

    The estimate of a model's latency is its measured median times the slowdown seen lately, over all models: so
    models that have not run for a while are judged by the load of now, too. Four mean deviations above it stand
    for the slowest run in a hundred. A model fits if with it neither the oldest nor the newest waiting request
    misses the target. The policy goes to a faster model at once, and to a more accurate one only after that had
    ample room for `HOLD` requests in a row, one step at a time: so it does not flap.

    Args:
        latency_s: Model → its median and 99th percentile in seconds, without a queue.
        target_s: Seconds from a request's arrival to its answer that 99 of 100 shall keep.
        ladder: The models, the most accurate and slowest first.

    Attributes:
        model: The model of the last decision.
        switches: Number of decisions for another model than the one before.

    Source: ours; the moving mean and deviation are those of TCP's timeout (RFC 6298).
    """

    def __init__(
        self, latency_s: Mapping[str, tuple[float, float]], target_s: float, ladder: Sequence[str]
    ) -> None:
        self.ladder = tuple(ladder)
        self.target_s = target_s
        self.switches = 0
        self._median = {name: latency_s[name][0] for name in ladder}
        self._slowdown = 1.0
        self._measured_deviation = max(p99 / p50 - 1 for p50, p99 in latency_s.values()) / DEVIATIONS
        self._deviation = self._measured_deviation
        self._level = self._calm = 0

    @property
    def model(self) -> str:
        """The model of the last decision."""
        return self.ladder[self._level]

    def choose(self, waited_s: float, num_waiting: int) -> str:
        """The model for the next request.

        Args:
            waited_s: Seconds since it arrived.
            num_waiting: Requests that wait behind it.
        """
        level = self._wanted(waited_s, num_waiting)
        self.switches += level != self._level
        self._level = level
        return self.model

    def observe(self, model: str, service_s: float, share: float = 1.0) -> None:
        """Learn from the seconds that a run took, without its wait; `share` is how much of the model it was."""
        slowdown = service_s / max(share * self._median[model], 1e-12)
        self._deviation += WEIGHT * (abs(slowdown - self._slowdown) - self._deviation)
        self._slowdown += WEIGHT * (slowdown - self._slowdown)

    def forget(self) -> None:
        """Go back to what was measured a little: of a request that is not run nothing is learnt, and one stall of
        the machine must not have all that come later refused."""
        self._slowdown += WEIGHT * (1 - self._slowdown)
        self._deviation += WEIGHT * (self._measured_deviation - self._deviation)

    def expect_s(self, model: str, waited_s: float, num_waiting: int) -> float:
        """Seconds from arrival to answer of the worst-off request, oldest or newest, if this model goes on."""
        mean = self._median[model] * self._slowdown
        tail = self._median[model] * (self._slowdown + DEVIATIONS * self._deviation)
        return max(waited_s, num_waiting * mean) + tail

    def goes_on(self, model: str, share: float, spent_s: float, num_waiting: int) -> bool:
        """Whether there is time for what is left of a larger model, when a smaller one has answered.

        Neither this request nor those that wait, which the fastest model may answer, miss the target for it.

        Args:
            model: The larger one.
            share: How much of it is left, in seconds relative to its median.
            spent_s: Seconds since the request arrived.
            num_waiting: Requests that wait behind it.
        """
        median, fastest = share * self._median[model], self._median[self.ladder[-1]]
        slow = self._slowdown + DEVIATIONS * self._deviation
        if spent_s + median * slow > self.target_s:
            return False
        behind = max(spent_s, num_waiting * fastest * self._slowdown) + median * self._slowdown + fastest * slow
        return not num_waiting or behind <= self.target_s

    def _wanted(self, waited_s: float, num_waiting: int) -> int:
        """Where on the ladder to be now."""
        expected = [self.expect_s(name, waited_s, num_waiting) for name in self.ladder]
        if expected[self._level] > self.target_s:
            self._calm = 0
            lower = range(self._level, len(self.ladder))
            return next((level for level in lower if expected[level] <= self.target_s), lower[-1])
        has_room = self._level > 0 and expected[self._level - 1] <= ROOM * self.target_s
        self._calm = self._calm + 1 if has_room else 0
        if self._calm < HOLD:
            return self._level
        self._calm = 0
        return self._level - 1

    def fits(self, waited_s: float, num_waiting: int = 0) -> bool:
        """Whether the fastest model can still answer a request in time, behind so many others.

        Args:
            waited_s: Seconds since it arrived.
            num_waiting: Requests in front of it.
        """
        median = self._median[self.ladder[-1]]
        mean, tail = median * self._slowdown, median * (self._slowdown + DEVIATIONS * self._deviation)
        return waited_s + num_waiting * mean + tail <= self.target_s


@dataclass(frozen=True)
class Served:
    """An answer and what it took.

    Attributes:
        model: Which model answered.
        output: `(num_classes,)` for one image, `(B, num_classes)` for a batch.
        waited_s: Seconds from the arrival to the start.
        service_s: Seconds from the start to the answer, those of earlier answers among them.
        earlier: The answers of smaller models that it refined, each with the seconds up to it.
    """

    model: str
    output: Tensor
    waited_s: float
    service_s: float
    earlier: tuple[Served, ...] = ()

    @property
    def latency_s(self) -> float:
        """Seconds from the arrival to the answer."""
        return self.waited_s + self.service_s


@dataclass
class Counts:
    """What became of the requests of a `DeadlineRunner`.

    Attributes:
        answered: Those with an answer.
        late: Of these the ones whose (last) answer came after the target.
        refined: Of these the ones that a larger model than the first has answered.
        full: Refused by `submit`: as many waited as may.
        hopeless: Refused by `submit`: behind those that wait even the fastest model would be late.
        dropped: Not run when their turn came: even the fastest model would have been late by then.
        failed: Those whose run raised.
    """

    answered: int = 0
    late: int = 0
    refined: int = 0
    full: int = 0
    hopeless: int = 0
    dropped: int = 0
    failed: int = 0


class DeadlineRunner:
    """Answers requests one after another, each with the most accurate model that the load allows.

    One thread runs the models; `submit` comes back at once with a future. Leaving the `with` block answers what is
    still waiting. Beyond what the fastest model can do there is no time for all: what even that one cannot answer
    in time is refused, by `submit` where that is clear already, else when its turn comes, through its future. The
    requests that are answered then keep their target.

    With `refine`, the fastest model answers first. Then the most accurate one for which there still is time goes
    on from where it parted from those that have run, and so on: what they share is not run again. That is decided
    by the seconds spent and the requests that wait at that moment, not beforehand; it pays where routes have much
    in front in common.

    Args:
        family: With its profile.
        target_ms: Milliseconds from a request's arrival to its answer that 99 of 100 shall keep.
        models: Those it may use; by default all whose accuracy is known.
        max_waiting: Requests that may wait.
        refine: Whether larger models go on from where the fastest one parted, as long as there is time.
        clock: Seconds that only grow.

    Attributes:
        policy: What chooses the models.
        counts: What became of the requests.

    Raises:
        BudgetError: Even the fastest of the models needs longer, at the 99th percentile and without a queue.
        MeasurementError: Latencies or accuracies are not known, an argument is no number, or `models` no list of
            models.

    Examples:
        >>> with DeadlineRunner(family, target_ms=20) as runner:
        ...     answers = [runner.submit(image) for image in images]
    """

    def __init__(
        self,
        family: Family,
        target_ms: float,
        models: Sequence[str] | None = None,
        max_waiting: int = 1024,
        refine: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        _check_numbers(target_ms, max_waiting)
        ladder = _ladder(family, models)
        latency_s = {name: family.latency_s(name) for name in ladder}
        fastest = min(ladder, key=lambda name: latency_s[name][1])
        if not latency_s[fastest][1] <= target_ms / 1e3:
            raise BudgetError(
                f"no model keeps a p99 of {target_ms:g} ms even without a queue",
                what=f"{fastest} has {1e3 * latency_s[fastest][1]:.3g} ms",
                nearest=(fastest,),
            )
        self.policy = LoadPolicy(latency_s, target_ms / 1e3, ladder)
        self.max_waiting = max_waiting
        self.counts = Counts()
        self._family, self._clock = family, clock
        self._waiting: SimpleQueue[_Request | None] = SimpleQueue()
        self._closed = False
        self._turn, self._process = threading.Lock(), os.getpid()
        for name in ladder:  # a first run takes longer by far, which would count against the model
            family.run(torch.zeros(family.input_size), name)
        self._rests = measure_rests(family, ladder, clock) if refine else None
        self._thread = threading.Thread(target=self._serve, name="detachnet-deadline", daemon=True)
        self._thread.start()

    def submit(self, image: Picture, on_answer: Callable[[Served], None] | None = None) -> Future[Served]:
        """Hand in an image, as `Family.run` takes it; its mistakes come out of the future.

        A tensor or picture is copied: what becomes of it afterwards does not matter. Requests are taken to be
        alike, single images or batches of one size: how long one takes is learnt from those before.

        Args:
            image: The image.
            on_answer: Called with each answer that a larger model is about to refine, in the thread that runs the
                models: what it raises comes out of the future.

        Raises:
            LateError: Behind those that wait even the fastest model would answer it too late.
            BudgetError: Too many requests wait.
            DetachNetError: The runner is closed, or another process made it.
        """
        arrived = self._clock()
        if os.getpid() != self._process:
            raise DetachNetError(
                "the runner belongs to another process: a fork has no threads", hint="make one in each"
            )
        request = _Request(_copied(image), arrived, Future(), on_answer)
        with self._turn:  # so that nothing is put behind the end
            if self._closed:
                raise DetachNetError("the runner is closed")
            waiting = self._waiting.qsize()
            if waiting >= self.max_waiting:
                self.counts.full += 1
                raise BudgetError(f"{waiting} requests wait already: more than the fastest model can answer")
            if waiting and not self.policy.fits(0.0, waiting):
                self.counts.hopeless += 1
                raise self._late(f"{waiting} requests wait before it")
            self._waiting.put(request)
        return request.future

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._turn:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def __enter__(self) -> DeadlineRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        while (request := self._waiting.get()) is not None:
            try:
                if request.future.set_running_or_notify_cancel():
                    self._answer(request)
            except BaseException:  # of whoever listens to the future, or has ended it: others wait for this thread
                logger.exception("what listens to an answer has failed")

    def _answer(self, request: _Request) -> None:
        began = self._clock()
        waited_s = began - request.arrived_s
        if not self.policy.fits(waited_s):
            self.counts.dropped += 1
            self.policy.forget()
            request.future.set_exception(self._late(f"it waited {1e3 * waited_s:.3g} ms"))
            return
        try:
            served = self._run(request, began) if self._rests is None else self._refine(request, began)
        except BaseException as error:  # belongs to whoever asked, SystemExit too: others wait for this thread
            self.counts.failed += 1
            request.future.set_exception(error)
            return
        self.counts.answered += 1
        self.counts.late += served.latency_s > self.policy.target_s
        self.counts.refined += bool(served.earlier)
        request.future.set_result(served)

    def _run(self, request: _Request, began: float) -> Served:
        """The answer of the model that the policy chooses."""
        waited_s = began - request.arrived_s
        model = self.policy.choose(waited_s, self._waiting.qsize())
        output = self._family.run(request.image, model).output
        service_s = self._clock() - began
        self.policy.observe(model, service_s)
        return Served(model, output, waited_s, service_s)

    def _refine(self, request: _Request, began: float) -> Served:
        """The answer of the fastest model, refined by larger ones while there is time."""
        work, model, share = self._family.resumable(request.image), self.policy.ladder[-1], 1.0
        earlier: tuple[Served, ...] = ()
        start = began
        while True:
            output = work.run(model).output
            now = self._clock()
            self.policy.observe(model, now - start, share)
            served = Served(model, output, began - request.arrived_s, now - began, earlier)
            larger = self._larger([*(answer.model for answer in earlier), model], served.latency_s)
            if larger is None:
                return served
            if request.on_answer:
                request.on_answer(served)
            earlier, (model, share), start = (*earlier, served), larger, self._clock()

    def _larger(self, ran: Sequence[str], spent_s: float) -> tuple[str, float] | None:
        """The most accurate model for which there is time, and how much of it is left behind those that ran."""
        num_waiting = self._waiting.qsize()
        for name in self.policy.ladder[: self.policy.ladder.index(ran[-1])]:
            share = min((self._rests or {})[small, name] for small in ran)
            if self.policy.goes_on(name, share, spent_s, num_waiting):
                return name, share
        return None

    def _late(self, why: str) -> LateError:
        target_ms, fastest = 1e3 * self.policy.target_s, self.policy.ladder[-1]
        return LateError(f"even {fastest} could not answer within {target_ms:g} ms: {why}", hint="ask less often")


def _check_numbers(target_ms: float, max_waiting: int) -> None:
    """Refuse a target or a limit that is no number.

    Raises:
        MeasurementError: It is such.
    """
    if isinstance(target_ms, bool) or not isinstance(target_ms, int | float) or not target_ms > 0:
        raise MeasurementError(f"target_ms is a number of milliseconds, not {target_ms!r}")
    if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 1:
        raise MeasurementError(f"max_waiting is a number of requests, not {max_waiting!r}")


def _copied(image: Picture) -> Picture:
    """A tensor or picture of its own; one that cannot be copied as it is: then its run says why."""
    try:
        return image.clone() if isinstance(image, Tensor) else image.copy() if isinstance(image, Image) else image
    except Exception:  # a decoder raises anything on damaged bytes
        return image


@dataclass(frozen=True)
class _Request:
    """An image that waits."""

    image: Picture
    arrived_s: float
    future: Future[Served]
    on_answer: Callable[[Served], None] | None = None


def _ladder(family: Family, models: Sequence[str] | None) -> list[str]:
    """The models from the most accurate to the fastest, without those another one beats in both."""
    if isinstance(family, nn.Module | str | Path):
        raise MeasurementError(
            f"this takes a Family, not {type(family).__name__}", hint="detachnet.Family.load(path) makes one"
        )
    if models is not None and (isinstance(models, str) or not models or len(set(models)) < len(models)):
        raise MeasurementError(
            f"models={models!r}: give a list of models, each once", hint=f"models={list(family.accuracy)}, or none"
        )
    for name in models or ():
        if name not in family.accuracy:
            family.latency_s(name)  # names an unknown model
            raise MeasurementError(f"it is not known how accurate {name} is")
    names = list(models or family.known_accuracy())
    names.sort(key=lambda name: (-family.accuracy[name], family.latency_s(name)[0]))
    ladder: list[str] = []
    for name in names:
        if not ladder or family.latency_s(name)[0] < family.latency_s(ladder[-1])[0]:
            ladder.append(name)
    return ladder
