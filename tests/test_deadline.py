import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch

import detachnet
from detachnet.backends import TorchBackend
from detachnet.deadline import HOLD, DeadlineRunner, LoadPolicy, Served
from detachnet.runtime import Family
from tests.test_runtime import make, profile_of

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
    assert all(later - earlier >= HOLD for earlier, later in pairwise(ups))
    assert all(rungs[i] - rungs[i + 1] == 1 for i in ups)


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


def test_a_long_queue_goes_to_a_faster_model(family: Family, gate: threading.Event) -> None:
    with DeadlineRunner(family, target_ms=100) as runner:
        futures = [runner.submit(torch.zeros(3, 32, 32)) for _ in range(60)]
        gate.set()
    models = [future.result(0).model for future in futures]
    assert "sub1" in models[1:]


def test_models_it_may_use(family: Family) -> None:
    with DeadlineRunner(family, target_ms=1000, models=["sub1"]) as runner:
        assert runner.submit(torch.zeros(3, 32, 32)).result(10).model == "sub1"
    with pytest.raises(detachnet.CutError, match="no model is called 'sub9'"):
        DeadlineRunner(family, target_ms=1000, models=["sub9"])
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


def test_without_accuracies_or_profile(family: Family) -> None:
    family.profile, profile = None, family.profile
    with pytest.raises(detachnet.MeasurementError, match="was not measured on a device yet"):
        DeadlineRunner(family, target_ms=1000)
    family.profile, family.accuracy = profile, {}
    with pytest.raises(detachnet.MeasurementError, match="does not say how accurate"):
        DeadlineRunner(family, target_ms=1000)
