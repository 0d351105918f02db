import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import detachnet
from detachnet.deploy.backends import TorchBackend
from detachnet.deploy.deadline import DeadlineRunner, LoadPolicy, Served
from detachnet.deploy.family import Answer, Family
from detachnet.deploy.rests import measure_rests
from tests.families import make, profile_of

LATENCY_S = {"base": (0.010, 0.012), "sub0": (0.005, 0.006), "sub1": (0.002, 0.0024)}
TARGET_S = 0.060


def simulate(
    policy: LoadPolicy, arrivals: Sequence[float], service_s: Callable[[str, float], float]
) -> list[tuple[str, float]]:
    """One server, first come, first served: model and latency of each request. No clock is involved."""
    now, served = 0.0, []
    for i, arrived in enumerate(arrivals):
        now = max(now, arrived)
        num_waiting = sum(later <= now for later in arrivals[i + 1 : i + 2000])
        model = policy.choose(now - arrived, num_waiting)
        seconds = service_s(model, now)
        now += seconds
        policy.observe(model, seconds)
        served.append((model, now - arrived))
    return served


def poisson(rate: float, n: int, seed: int = 0) -> list[float]:
    generator, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(n):
        now += generator.expovariate(rate)
        arrivals.append(now)
    return arrivals


def noisy(slowdown: Callable[[float], float] = lambda now: 1.0) -> Callable[[str, float], float]:
    generator = random.Random(1)
    return lambda model, now: LATENCY_S[model][0] * slowdown(now) * generator.uniform(0.9, 1.15)


def p99(served: Sequence[tuple[str, float]]) -> float:
    return sorted(latency for _, latency in served)[int(0.99 * len(served))]


def ladder(*models: str) -> LoadPolicy:
    return LoadPolicy(LATENCY_S, TARGET_S, models or tuple(LATENCY_S))


@pytest.mark.parametrize("rate", [120, 250, 400])
def test_holds_the_target_where_the_base_alone_cannot(rate: float) -> None:
    arrivals = poisson(rate, 3000)
    alone = simulate(ladder("base"), arrivals, noisy())
    policy = ladder()
    served = simulate(policy, arrivals, noisy())
    assert p99(alone) > 10 * TARGET_S
    assert p99(served) <= TARGET_S
    assert len(Counter(model for model, _ in served)) > 1


def test_an_idle_machine_runs_the_base_only() -> None:
    policy = ladder()
    served = simulate(policy, poisson(30, 500), noisy())
    assert {model for model, _ in served} == {"base"}
    assert policy.switches == 0


@pytest.mark.slow
def test_more_load_means_less_of_the_base() -> None:
    shares = []
    for rate in (60, 110, 150, 250, 450):
        served = simulate(ladder(), poisson(rate, 2000), noisy())
        shares.append(sum(model == "base" for model, _ in served) / len(served))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.1


def test_comes_back_after_a_burst() -> None:
    burst = poisson(400, 400)
    calm = [burst[-1] + 0.1 * (i + 1) for i in range(200)]
    served = simulate(ladder(), [*burst, *calm], noisy())
    assert {"sub0", "sub1"} & {model for model, _ in served[:400]}
    assert {model for model, _ in served[-100:]} == {"base"}


def test_does_not_flap() -> None:
    policy = ladder()
    served = simulate(policy, poisson(180, 3000), noisy())
    rungs = [list(LATENCY_S).index(model) for model, _ in served]
    ups = [i for i, (before, after) in enumerate(pairwise(rungs)) if after < before]
    assert policy.switches == sum(before != after for before, after in pairwise(rungs))
    assert all(later - earlier >= 25 for earlier, later in pairwise(ups))
    assert all(rungs[i] - rungs[i + 1] == 1 for i in ups)


def test_comes_back_after_25_requests_with_room_and_one_step_at_a_time() -> None:
    policy = ladder()
    assert policy.choose(0.0, 1000) == "sub1"
    assert [policy.choose(0.0, 0) for _ in range(51)] == ["sub1"] * 24 + ["sub0"] * 25 + ["base"] * 2
    assert policy.choose(0.0, 1000) == "sub1"
    calm = [policy.choose(0.0, 0) for _ in range(24)]
    policy.choose(0.050, 0)  # in time with sub1, but without room for sub0: it counts anew
    assert calm + [policy.choose(0.0, 0) for _ in range(25)] == ["sub1"] * 48 + ["sub0"]
    assert policy.choose(0.0, 1000) == "sub1"
    calm = [policy.choose(0.0, 0) for _ in range(24)]
    policy.choose(0.0, 1000)  # too late even with sub1: it counts anew, too
    assert calm + [policy.choose(0.0, 0) for _ in range(25)] == ["sub1"] * 48 + ["sub0"]


@pytest.mark.parametrize(("target_s", "back"), [(0.0172, "base"), (0.0170, "sub0")])
def test_room_is_seven_tenths_of_the_target(target_s: float, back: str) -> None:
    """The base-model's p99 is 12 ms: 0.7 of 17.2 ms are more, of 17.0 ms less."""
    policy = LoadPolicy(LATENCY_S, target_s, tuple(LATENCY_S))
    assert policy.choose(0.0, 1000) == "sub1"
    for _ in range(100):
        policy.choose(0.0, 0)
    assert policy.model == back


def test_the_estimate_is_that_of_tcp() -> None:
    """RFC 6298 with a weight of 1/32: by hand, for a run of twice its median and one of just that."""
    policy = LoadPolicy({"base": (0.010, 0.012)}, 1.0, ["base"])
    policy.observe("base", 0.020)  # mean 1 + 1/32; deviation 0.05 + 0.95 / 32
    assert policy.expect_s("base", 0, 0) == pytest.approx(0.010 * (1.03125 + 4 * 0.0796875), abs=1e-12)
    policy.observe("base", 0.010)
    assert policy.expect_s("base", 0, 0) == pytest.approx(0.0134296875, abs=1e-12)
    assert policy.expect_s("base", 0, 10) == pytest.approx(0.10302734375 + 0.0134296875, abs=1e-12)


def test_follows_a_machine_that_slows_down_and_recovers() -> None:
    arrivals = [i / 50 for i in range(1500)]
    served = simulate(ladder(), arrivals, noisy(lambda now: 6.0 if 10 < now < 20 else 1.0))
    slow = [model for model, _ in served[600:1000]]
    assert "base" not in slow
    assert {model for model, _ in served[-100:]} == {"base"}


def test_the_estimate_of_every_model_follows_the_slowdown_of_one() -> None:
    policy = ladder()
    for _ in range(200):
        policy.observe("sub1", 3 * LATENCY_S["sub1"][0])
    assert policy.expect_s("base", 0, 0) == pytest.approx(3 * LATENCY_S["base"][0], rel=0.1)
    for _ in range(200):
        policy.observe("sub1", LATENCY_S["sub1"][0])
    assert policy.expect_s("base", 0, 0) == pytest.approx(LATENCY_S["base"][0], rel=0.1)


def test_expectation_without_history_is_the_profile() -> None:
    policy = LoadPolicy({"sub1": (0.002, 0.0024)}, TARGET_S, ["sub1"])
    assert policy.expect_s("sub1", 0, 0) == pytest.approx(0.0024)
    assert policy.expect_s("sub1", 0.01, 2) == pytest.approx(0.01 + 0.0024)
    assert policy.expect_s("sub1", 0, 10) == pytest.approx(0.02 + 0.0024)


@pytest.fixture
def family() -> Family:
    net = make()
    return Family(TorchBackend(net, 1), "family.safetensors", profile_of(net))


@pytest.fixture
def gate(family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is closed, no model runs after its first run, before requests are taken."""
    event, run, fresh = threading.Event(), family._backend.run, set(family.names)

    def wait(name: str, images: torch.Tensor) -> torch.Tensor:
        if name in fresh:
            fresh.remove(name)
        else:
            assert event.wait(10)
        return run(name, images)

    monkeypatch.setattr(family._backend, "run", wait)
    yield event
    event.set()


@pytest.mark.slow
def test_runner_answers_what_the_family_answers(family: Family) -> None:
    images = list(torch.randn(20, 3, 32, 32))
    with DeadlineRunner(family, target_ms=10_000) as runner:
        futures = [runner.submit(image) for image in images]
    for image, future in zip(images, futures, strict=True):
        served: Served = future.result(0)
        assert torch.equal(served.output, family.run(image, served.model).output)
        assert served.latency_s == served.waited_s + served.service_s
        assert served.waited_s >= 0 < served.service_s


def test_first_runs_do_not_count(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, run = [], family._backend.run
    monkeypatch.setattr(family._backend, "run", lambda name, images: (ran.append(name), run(name, images))[1])
    with DeadlineRunner(family, target_ms=1000) as runner:
        assert ran == ["base", "sub0", "sub1"]
        assert runner.policy.expect_s("base", 0, 0) == pytest.approx(family.latency_s("base")[1])
        runner.submit(torch.zeros(3, 32, 32)).result(10)
        assert runner.policy.expect_s("base", 0, 0) != pytest.approx(family.latency_s("base")[1])


@pytest.mark.slow
def test_runner_counts_the_wait(family: Family, gate: threading.Event) -> None:
    now = {"time": 0.0}
    runner = DeadlineRunner(family, target_ms=3_000, clock=lambda: now["time"])
    first, second = runner.submit(torch.zeros(3, 32, 32)), runner.submit(torch.zeros(3, 32, 32))
    while not first.running():
        pass
    now["time"] = 2.0
    gate.set()
    assert second.result(10).waited_s == 2.0
    runner.close()
    assert first.result(0).service_s in (0.0, 2.0)


@pytest.mark.slow
def test_a_long_queue_goes_to_a_faster_model(family: Family, gate: threading.Event) -> None:
    with DeadlineRunner(family, target_ms=100, clock=lambda: 0.0) as runner:
        futures = [runner.submit(torch.zeros(3, 32, 32)) for _ in range(60)]
        gate.set()
    models = [future.result(0).model for future in futures]
    assert "sub1" in models[1:]


def test_models_it_may_use(family: Family) -> None:
    with DeadlineRunner(family, target_ms=1000, models=["sub1"]) as runner:
        assert runner.submit(torch.zeros(3, 32, 32)).result(10).model == "sub1"
    with pytest.raises(detachnet.CutError, match="no model is called 'sub9'"):
        DeadlineRunner(family, target_ms=1000, models=["sub9"])
    for wrong in ([], ["sub1", "sub1"], "sub1"):
        with pytest.raises(detachnet.MeasurementError, match="give a list of models, each once"):
            DeadlineRunner(family, target_ms=1000, models=wrong)
    del family.accuracy["sub1"]
    with pytest.raises(detachnet.MeasurementError, match="it is not known how accurate sub1 is"):
        DeadlineRunner(family, target_ms=1000, models=["sub1"])


def test_a_model_that_is_slower_and_worse_is_left_out(family: Family) -> None:
    family.accuracy["sub0"] = 0.5
    with DeadlineRunner(family, target_ms=1000) as runner:
        assert runner.policy.ladder == ("base", "sub1")


def test_a_mistake_comes_out_of_its_future_only(family: Family) -> None:
    with DeadlineRunner(family, target_ms=1000) as runner:
        wrong, right = runner.submit(torch.zeros(3, 31, 31)), runner.submit(torch.zeros(3, 32, 32))
    with pytest.raises(detachnet.DataError, match="not 3×31×31"):
        wrong.result(0)
    assert right.result(0).output.shape == (10,)


def test_refusals(family: Family, gate: threading.Event) -> None:
    with pytest.raises(
        detachnet.BudgetError, match=re.escape("no model keeps a p99 of 1 ms even without a queue")
    ):
        DeadlineRunner(family, target_ms=1)
    runner = DeadlineRunner(family, target_ms=1000, max_waiting=2)
    first = runner.submit(torch.zeros(3, 32, 32))
    while not first.running():
        pass
    futures = [runner.submit(torch.zeros(3, 32, 32)) for _ in range(2)]
    with pytest.raises(detachnet.BudgetError, match="2 requests wait already"):
        runner.submit(torch.zeros(3, 32, 32))
    futures[1].cancel()
    gate.set()
    runner.close()
    assert first.done()
    assert futures[1].cancelled()
    with pytest.raises(detachnet.DetachNetError, match="the runner is closed"):
        runner.submit(torch.zeros(3, 32, 32))


def test_what_cannot_be_in_time_is_refused_at_once(family: Family, gate: threading.Event) -> None:
    """A run of sub1 takes 0.8 ms, 2 at most: behind 35 others, of which one has begun, that is 30."""
    with DeadlineRunner(family, target_ms=30.4, models=["sub1"], clock=lambda: 0.0) as runner:
        futures = [runner.submit(torch.zeros(3, 32, 32))]
        while not futures[0].running():
            pass
        futures += [runner.submit(torch.zeros(3, 32, 32)) for _ in range(36)]
        with pytest.raises(detachnet.LateError, match=r"even sub1 could not answer .* 36 requests wait before it"):
            runner.submit(torch.zeros(3, 32, 32))
        assert runner.counts.hopeless == 1
        gate.set()
    assert [future.exception(0) for future in futures] == [None] * 37


def test_without_accuracies_or_profile(family: Family) -> None:
    family.profile, profile = None, family.profile
    with pytest.raises(detachnet.MeasurementError, match="was not measured on a device yet"):
        DeadlineRunner(family, target_ms=1000)
    family.profile, family.accuracy = profile, {}
    with pytest.raises(detachnet.MeasurementError, match="does not say how accurate"):
        DeadlineRunner(family, target_ms=1000)


class Stub:
    """A family on a machine whose time is a number."""

    path, input_size = "stub", (3, 2, 2)

    def __init__(self) -> None:
        self.service_s: Callable[[str, float], float] = lambda model, now: 0.0
        self.now = 0.0
        self.accuracy = {"base": 0.9, "sub0": 0.8, "sub1": 0.6}

    def known_accuracy(self) -> dict[str, float]:
        return self.accuracy

    def latency_s(self, name: str) -> tuple[float, float]:
        return LATENCY_S[name]

    def run(self, image: torch.Tensor, name: str) -> Answer:
        self.now += self.service_s(name, self.now)
        return Answer(name, image)

    def resumable(self, image: torch.Tensor) -> "StubWork":
        return StubWork(self, image)


REST = 0.4
"""What a larger model of the stub takes behind any smaller one, as a share of itself."""


class StubWork:
    """An image on its way through models of the stub."""

    def __init__(self, stub: Stub, image: torch.Tensor) -> None:
        self.stub, self.image, self.ran = stub, image, list[str]()

    def run(self, name: str) -> Answer:
        share = REST if self.ran else 1.0
        self.ran.append(name)
        self.stub.now += share * self.stub.service_s(name, self.stub.now)
        return Answer(name, self.image)


class NoThread(threading.Thread):
    def start(self) -> None:
        pass


def serve(
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    stall_s: float,
    *,
    refusing: bool = True,
    refine: bool = False,
    n: int = 8000,
) -> tuple[DeadlineRunner, list[float]]:
    """A runner in virtual time, with Poisson arrivals and one stall of the machine; latencies of the answers."""
    usual, stalls = noisy(), [stall_s]

    def service_s(model: str, now: float) -> float:
        stalled = stalls.pop() if stalls and now > 2 else 0.0
        return usual(model, now) + stalled

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", NoThread)
        if not refusing:
            patch.setattr(LoadPolicy, "fits", lambda *_: True)
        stub = Stub()
        stub.service_s = lambda model, now: LATENCY_S[model][0]
        runner = DeadlineRunner(
            stub,  # type: ignore[arg-type]
            1e3 * TARGET_S,
            max_waiting=10**6,
            refine=refine,
            clock=lambda: stub.now,
        )
        stub.now = 0.0
        stub.service_s, free, futures = service_s, 0.0, []
        for arrived in [*poisson(rate, n), float("inf")]:
            while runner._waiting.qsize() and free <= arrived:
                request = runner._waiting.get()
                assert request is not None
                stub.now = max(free, request.arrived_s)
                request.future.set_running_or_notify_cancel()
                runner._answer(request)
                free = stub.now
            stub.now = arrived
            if arrived < float("inf"):
                try:
                    futures.append(runner.submit(torch.zeros(3, 2, 2)))
                except detachnet.LateError:
                    continue
        answers = [future.result(0) for future in futures if not future.exception(0)]
        return runner, [answer.latency_s for answer in answers]


def test_a_wait_is_no_slowness_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", NoThread)
    stub = Stub()
    runner = DeadlineRunner(stub, 1e3 * TARGET_S, clock=lambda: stub.now)  # type: ignore[arg-type]
    stub.service_s = lambda model, now: LATENCY_S[model][0]
    future = runner.submit(torch.zeros(3, 2, 2))
    request = runner._waiting.get()
    assert request is not None
    stub.now = 0.030
    runner._answer(request)
    served = future.result(0)
    assert (served.model, served.waited_s, served.service_s) == ("base", 0.030, pytest.approx(0.010))
    # The run took its median: the mean stays, the deviation of 0.05 loses a 32nd.
    assert runner.policy.expect_s("base", 0, 0) == pytest.approx(0.010 * (1 + 4 * 0.05 * 31 / 32))


def test_what_is_not_run_brings_the_estimate_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one stall of the machine would have all that come later refused."""
    monkeypatch.setattr(threading, "Thread", NoThread)
    stub = Stub()
    runner = DeadlineRunner(stub, 1e3 * TARGET_S, clock=lambda: stub.now)  # type: ignore[arg-type]
    for _ in range(100):
        runner.policy.observe("sub1", 100 * LATENCY_S["sub1"][0])
    before = runner.policy.expect_s("sub1", 0, 0)
    future = runner.submit(torch.zeros(3, 2, 2))
    request = runner._waiting.get()
    assert request is not None
    runner._answer(request)
    assert isinstance(future.exception(0), detachnet.LateError)
    assert runner.policy.expect_s("sub1", 0, 0) < 0.98 * before
    assert (runner.counts.dropped, runner.counts.answered) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "stall_s"), [(200, 0), (200, 3), (400, 1), (400, 3), (900, 0)])
def test_what_is_answered_is_in_time_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, rate: float, stall_s: float
) -> None:
    runner, latencies = serve(monkeypatch, rate, stall_s)
    counts = runner.counts
    assert counts.answered == len(latencies)
    assert counts.answered + counts.hopeless + counts.dropped == 8000
    assert counts.late == sum(latency > TARGET_S for latency in latencies)
    assert counts.late <= 0.002 * len(latencies)
    assert sorted(latencies)[int(0.99 * len(latencies))] <= TARGET_S
    lost = counts.hopeless + counts.dropped
    most = (
        1.2 * rate * (stall_s + 0.3) if rate < 500 else 8000 * (1 - 430 / rate)
    )  # the fastest answers 490 per second
    assert lost <= most
    if (rate, stall_s) == (200, 0):
        assert lost == 0
    _, all_late = serve(monkeypatch, rate, stall_s, refusing=False)
    late = sum(latency > TARGET_S for latency in all_late)
    assert late >= 5 * counts.late + rate * stall_s


def refining(
    monkeypatch: pytest.MonkeyPatch, target_s: float, num_waiting: int = 0, wait_s: float = 0.0
) -> tuple[DeadlineRunner, Served]:
    """The answer of a runner that refines, in virtual time, to a request that others wait behind."""
    monkeypatch.setattr(threading, "Thread", NoThread)
    stub = Stub()
    stub.service_s = lambda model, now: LATENCY_S[model][0]
    runner = DeadlineRunner(stub, 1e3 * target_s, refine=True, clock=lambda: stub.now)  # type: ignore[arg-type]
    future, *_ = [runner.submit(torch.zeros(3, 2, 2)) for _ in range(1 + num_waiting)]
    request = runner._waiting.get()
    assert request is not None
    stub.now += wait_s
    runner._answer(request)
    return runner, future.result(0)


def test_a_larger_model_goes_on_from_where_the_fastest_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, served = refining(monkeypatch, TARGET_S, wait_s=0.003)
    (first,) = served.earlier
    assert (first.model, first.waited_s, first.service_s) == ("sub1", pytest.approx(0.003), pytest.approx(0.002))
    assert (served.model, served.waited_s) == ("base", pytest.approx(0.003))
    assert served.service_s == pytest.approx(0.002 + REST * 0.010)  # sub0, which the base-model beats, is not run
    assert (runner.counts.answered, runner.counts.refined, runner.counts.late) == (1, 1, 0)
    # Both took what was expected of them: the mean stays, the deviation of 0.05 loses a 32nd twice.
    assert runner.policy.expect_s("base", 0, 0) == pytest.approx(0.010 * (1 + 4 * 0.05 * (31 / 32) ** 2))


@pytest.mark.parametrize(
    ("target_s", "num_waiting", "models"),
    [
        (0.0068, 0, ["sub1", "base"]),  # 2 ms, and 4 ms at most 1.2 times as long, are 6.8 ms
        (0.0067, 0, ["sub1", "sub0"]),
        (0.0043, 0, ["sub1"]),
        (0.0112, 2, ["sub1", "base"]),  # the two behind it have 4 ms for the base-model, then their own
        (0.0088, 2, ["sub1", "sub0"]),
        (0.0088, 3, ["sub1"]),
    ],
)
def test_no_one_misses_the_target_for_it(
    monkeypatch: pytest.MonkeyPatch, target_s: float, num_waiting: int, models: list[str]
) -> None:
    _, served = refining(monkeypatch, target_s, num_waiting)
    assert [answer.model for answer in (*served.earlier, served)] == models


def test_time_that_is_left_is_used_twice() -> None:
    """Where the most accurate model does not fit at first, and fits behind another one, it comes third."""
    policy = LoadPolicy(LATENCY_S, 0.0105, tuple(LATENCY_S))
    assert not policy.goes_on("base", 0.9, 0.002, 0)
    assert policy.goes_on("sub0", 0.5, 0.002, 0)
    assert policy.goes_on("base", 0.4, 0.002 + 0.0025, 0)


@pytest.mark.parametrize(("rate", "stall_s"), [(60, 0), (200, 0), (400, 1), (900, 0)])
def test_refined_answers_are_in_time_too(monkeypatch: pytest.MonkeyPatch, rate: float, stall_s: float) -> None:
    runner, latencies = serve(monkeypatch, rate, stall_s, refine=True, n=3000)
    assert runner.counts.late <= 0.002 * len(latencies) + 1
    assert sorted(latencies)[int(0.99 * len(latencies))] <= TARGET_S
    share = runner.counts.refined / len(latencies)
    assert share == 1 if rate == 60 else 0 < share < 1


def late_family(**accuracy: float) -> Family:
    """A sub-model without late layers, which shares most with the base-model."""
    torch.manual_seed(0)
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    subs = {"sub1": detachnet.SubModel(drop=["features.16:features.22"])}
    net = detachnet.make_detachable(model, subs, check="none").eval()
    net.facts = net.facts.updated(accuracy={"base": 0.9, "sub1": 0.6} | accuracy)
    measured = profile_of(make())
    rows = [measured[name].model_copy(update={"macs": net.plan[name].macs}) for name in net.names]
    return Family(TorchBackend(net, 1), "family.safetensors", measured.model_copy(update={"rows": tuple(rows)}))


@pytest.mark.slow
def test_only_what_parted_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    family, told, legs = late_family(), list[Served](), list[str]()
    run_leg = family._backend.run_leg
    monkeypatch.setattr("detachnet.deploy.deadline.measure_rests", lambda *_: {("sub1", "base"): 0.7})
    monkeypatch.setattr(family._backend, "run_leg", lambda leg, x: (legs.append(str(leg)), run_leg(leg, x))[1])
    image = torch.randn(3, 32, 32)
    with DeadlineRunner(family, target_ms=10_000, refine=True) as runner:
        served = runner.submit(image, told.append).result(10)
    assert legs == [
        "image → features.16 of base, sub1",
        "features.16 → output of sub1",
        "features.16 → output of base",
    ]
    assert told == list(served.earlier)
    for answer, name in ((told[0], "sub1"), (served, "base")):
        assert answer.model == name
        torch.testing.assert_close(answer.output, family.run(image, name).output, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_listens_to_answers_fails_its_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detachnet.deploy.deadline.measure_rests", lambda *_: {("sub1", "base"): 0.7})
    with DeadlineRunner(late_family(), target_ms=10_000, refine=True) as runner:
        wrong = runner.submit(torch.zeros(3, 32, 32), lambda served: {}[served.model])
        right = runner.submit(torch.zeros(3, 32, 32))
    assert isinstance(wrong.exception(0), KeyError)
    assert right.result(0).output.shape == (10,)


def test_what_is_left_is_measured() -> None:
    stub = Stub()
    stub.service_s = lambda model, now: LATENCY_S[model][0]
    rests = measure_rests(stub, ["base", "sub0", "sub1"], lambda: stub.now)  # type: ignore[arg-type]
    assert rests == {pair: pytest.approx(REST) for pair in (("sub0", "base"), ("sub1", "base"), ("sub1", "sub0"))}


def test_a_machine_that_stays_too_slow_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ladder()
    for _ in range(100):
        policy.observe("sub1", 100 * LATENCY_S["sub1"][0])
    assert not policy.fits(0, 0)
    for _ in range(200):
        policy.forget()
    assert policy.fits(0, 0)
    assert policy.expect_s("base", 0, 0) == pytest.approx(LATENCY_S["base"][1], rel=0.3)


def test_what_fits() -> None:
    policy = LoadPolicy({"sub1": (0.002, 0.0024)}, TARGET_S, ["sub1"])
    assert policy.fits(0.0575)
    assert not policy.fits(0.058)
    assert policy.fits(0.0, 28)
    assert not policy.fits(0.0, 29)


@pytest.mark.slow
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, ValueError])
def test_a_run_that_ends_the_program_fails_its_request_only(
    family: Family, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    run = family._backend.run

    def evil(name: str, images: torch.Tensor) -> torch.Tensor:
        if images.sum() > 0:
            raise error
        return run(name, images)

    monkeypatch.setattr(family._backend, "run", evil)
    with DeadlineRunner(family, target_ms=10_000) as runner:
        futures = [runner.submit(torch.full((3, 32, 32), float(i == 1))) for i in range(4)]
    assert isinstance(futures[1].exception(0), error)
    assert [future.exception(0) for i, future in enumerate(futures) if i != 1] == [None] * 3
    assert (runner.counts.answered, runner.counts.failed) == (3, 1)


def test_what_listens_to_a_future_ends_nothing(family: Family, gate: threading.Event) -> None:
    def leave_with(error: type[BaseException]) -> Callable[[object], None]:
        def leave(_: object) -> None:
            raise error

        return leave

    with DeadlineRunner(family, target_ms=10_000) as runner:
        futures = [runner.submit(torch.zeros(3, 32, 32)) for _ in range(6)]
        for future, error in zip(futures, (SystemExit, KeyboardInterrupt, ValueError), strict=False):
            future.add_done_callback(leave_with(error))
        futures[4].set_result(Served("nobody", torch.zeros(10), 0, 0))  # somebody else's answer
        gate.set()
    assert [future.exception(0) for future in futures] == [None] * 6
    assert futures[4].result(0).model == "nobody"


def test_a_picture_that_cannot_be_copied_fails_its_request_only(family: Family, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    family.data = detachnet.DataInfo(name="n", classes=(), mean=(0.5,) * 3, std=(0.2,) * 3)
    with DeadlineRunner(family, target_ms=10_000) as runner:
        cut = runner.submit(Image.open(BytesIO(content[:2000])))
        wide = runner.submit(torch.zeros(1).expand(3, 10**6, 10**8))
        right = runner.submit(Image.open(BytesIO(content)))
    assert isinstance(cut.exception(0), detachnet.DataError)
    assert isinstance(wide.exception(0), detachnet.DataError)
    assert right.result(0).output.shape == (10,)
    assert (runner.counts.answered, runner.counts.failed) == (1, 2)


def test_another_process_has_no_thread_of_it(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    with DeadlineRunner(family, target_ms=10_000) as runner:
        with monkeypatch.context() as patch:
            patch.setattr("detachnet.deploy.deadline.os.getpid", lambda: -1)
            with pytest.raises(
                detachnet.DetachNetError, match="belongs to another process: a fork has no threads"
            ):
                runner.submit(torch.zeros(3, 32, 32))
        assert runner.submit(torch.zeros(3, 32, 32)).result(10).output.shape == (10,)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_image_that_is_not_finite_gets_no_answer(family: Family, value: float) -> None:
    image = torch.zeros(3, 32, 32)
    image[1, 2, 3] = value
    with DeadlineRunner(family, target_ms=10_000) as runner:
        future = runner.submit(image)
    with pytest.raises(detachnet.DataError, match=f"the image holds {value}"):
        future.result(0)
    assert (runner.counts.answered, runner.counts.failed) == (0, 1)


def test_an_image_that_changes_afterwards(family: Family, gate: threading.Event) -> None:
    image = torch.zeros(3, 32, 32)
    with DeadlineRunner(family, target_ms=10_000) as runner:
        future = runner.submit(image)
        image.fill_(5)
        gate.set()
        served = future.result(10)
    assert torch.equal(served.output, family.run(torch.zeros(3, 32, 32), served.model).output)


@pytest.mark.slow
def test_closing_beside_submitting_loses_no_future(family: Family) -> None:
    for _ in range(5):
        runner = DeadlineRunner(family, target_ms=10_000, models=["sub1"])
        futures: list[Future[Served]] = []

        def ask(runner: DeadlineRunner = runner, futures: list[Future[Served]] = futures) -> None:
            with suppress(detachnet.DetachNetError):
                while True:
                    futures.append(runner.submit(torch.zeros(3, 32, 32)))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        runner.close()
        for thread in threads:
            thread.join(10)
        assert all(future.done() for future in futures)


@pytest.mark.slow
def test_the_end_is_behind_whatever_was_accepted(family: Family) -> None:
    """`close` in the midst of a `submit`, made certain: it waits."""
    runner = DeadlineRunner(family, target_ms=10_000)
    closing = threading.Thread(target=runner.close)

    class Waiting(type(runner._waiting)):  # type: ignore[misc]
        def put(self, item: object) -> None:
            if item is not None:
                closing.start()
                closing.join(0.2)
                assert closing.is_alive()
            inside.put(item)

    inside = runner._waiting
    runner._waiting = Waiting()
    runner._waiting.get = inside.get  # type: ignore[method-assign]
    runner._waiting.qsize = inside.qsize  # type: ignore[method-assign]
    future = runner.submit(torch.zeros(3, 32, 32))
    closing.join(10)
    assert future.result(10).output.shape == (10,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_ms": "20"}, "target_ms is a number of milliseconds, not '20'"),
        ({"target_ms": float("nan")}, "target_ms is a number of milliseconds, not nan"),
        ({"target_ms": True}, "target_ms is a number of milliseconds, not True"),
        ({"target_ms": 20, "max_waiting": True}, "max_waiting is a number of requests, not True"),
        ({"target_ms": 20, "max_waiting": None}, "max_waiting is a number of requests, not None"),
        ({"target_ms": 20, "max_waiting": 0}, "max_waiting is a number of requests, not 0"),
    ],
)
def test_numbers(family: Family, options: dict[str, object], message: str) -> None:
    with pytest.raises(detachnet.MeasurementError, match=message):
        DeadlineRunner(family, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["family", torch.nn.Linear(2, 2)])
def test_what_is_no_loaded_family_is_refused(given: Any) -> None:
    with pytest.raises(detachnet.MeasurementError, match=r"takes a Family, not[\s\S]*Family.load"):
        DeadlineRunner(given, 20)
