import copy
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detachnet_cli.app import app
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import detachnet
from detachnet.data.datasets import Split
from detachnet.deploy import cascade
from detachnet.deploy.backends import TorchBackend
from detachnet.deploy.cascade import Cascade, Curve, Scores, all_points, calibrate, evaluate, pareto, score, thin
from detachnet.deploy.family import Family
from detachnet.surgery.legs import Leg
from tests.families import DATA, make

SCORES = Scores(
    confidence={
        "small": torch.tensor([0.9, 0.4, 0.6, 0.3]),
        "medium": torch.tensor([0.9, 0.9, 0.5, 0.2]),
        "large": torch.tensor([0.1, 0.1, 0.1, 0.1]),
    },
    right={
        "small": torch.tensor([True, False, True, False]),
        "medium": torch.tensor([True, True, False, False]),
        "large": torch.tensor([True, True, True, True]),
    },
    macs={"large": 100, "medium": 50, "small": 10},
)


def test_costs_of_a_chain_add_up() -> None:
    point = evaluate(SCORES, ("small", "large"), 0.5)
    assert point.shares == {"small": 0.5, "large": 0.5}
    assert point.mean_macs == (4 * 10 + 2 * 100) / 4
    assert point.accuracy == 1.0
    point = evaluate(SCORES, ("small", "medium", "large"), 0.5)
    assert point.shares == {"small": 0.5, "medium": 0.25, "large": 0.25}
    assert point.mean_macs == (4 * 10 + 2 * 50 + 1 * 100) / 4


@pytest.mark.parametrize(
    ("count", "longest", "said"),
    [
        (3, 3, ""),
        (9, 9, ""),
        (12, 4, "chains of at most 4 of the 12 models were tried"),
        (16, 3, "chains of at most 3 of the 16 models were tried"),
        (1000, 2, "chains of at most 2 of 40 of 1000 models were tried"),
    ],
)
def test_of_many_models_some_chains_are_tried(
    monkeypatch: pytest.MonkeyPatch, count: int, longest: int, said: str
) -> None:
    some = {f"m{i}": torch.rand(4) for i in range(count)}
    scores = Scores(some, {n: c > 0.5 for n, c in some.items()}, {n: i + 1 for i, n in enumerate(some)})
    monkeypatch.setattr(cascade, "STEPS", 1)
    monkeypatch.setattr(cascade, "score", lambda *_: scores)
    chains = {point.models for point in all_points(scores)}
    assert max(map(len, chains)) == longest
    assert len(chains) <= 1000
    assert any(chain[0] == "m0" and chain[-1] == f"m{count - 1}" for chain in chains)
    curve = calibrate(None, Split(torch.zeros(4), torch.zeros(4), ("a",)))  # type: ignore[arg-type]
    assert (curve.tried, curve.table.notes[-1:]) == (said, (said,) if said else ())


def test_what_models_share_is_spent_once() -> None:
    shared = {("small", "medium"): 4, ("small", "large"): 4, ("medium", "large"): 30}
    scores = replace(SCORES, shared=shared)
    point = evaluate(scores, ("small", "medium", "large"), 0.5)
    assert point.mean_macs == (4 * 10 + 2 * (50 - 4) + 1 * (100 - 30)) / 4
    assert point.mean_macs_apart == (4 * 10 + 2 * 50 + 1 * 100) / 4
    assert evaluate(scores, ("small", "large"), 0.5).mean_macs == (4 * 10 + 2 * (100 - 4)) / 4


def test_the_ends_are_the_first_model_and_all_of_them() -> None:
    first, all_models = (evaluate(SCORES, ("small", "medium", "large"), t) for t in (0.0, 1.1))
    assert (first.mean_macs, first.accuracy) == (10, 0.5)
    assert (all_models.mean_macs, all_models.accuracy) == (160, 1.0)
    assert all_models.shares == {"small": 0, "medium": 0, "large": 1}


@given(st.lists(st.floats(0, 1.1), min_size=2, max_size=6), st.integers(0, 2**31))
@settings(max_examples=30)
def test_a_higher_threshold_costs_more(thresholds: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    confidence = {name: torch.rand(40, generator=generator) for name in SCORES.macs}
    scores = Scores(confidence, {name: values > 0.5 for name, values in confidence.items()}, SCORES.macs)
    points = [evaluate(scores, ("small", "medium", "large"), t) for t in sorted(thresholds)]
    macs = [point.mean_macs for point in points]
    assert macs == sorted(macs)
    assert all(sum(point.shares.values()) == pytest.approx(1) for point in points)


def test_every_chain_is_tried() -> None:
    chains = {point.models for point in all_points(SCORES)}
    assert chains == {("small", "medium"), ("small", "large"), ("medium", "large"), ("small", "medium", "large")}


def test_pareto_and_thin() -> None:
    points = all_points(SCORES)
    front = pareto(points)
    for point in points:
        assert any(f.accuracy >= point.accuracy and f.mean_macs <= point.mean_macs for f in front)
    assert [f.accuracy for f in front] == sorted({f.accuracy for f in front})
    worse, better = (points[0].model_copy(update={"mean_macs": 9.0, "accuracy": a}) for a in (0.5, 0.7))
    assert pareto([worse, better]) == pareto([better, worse]) == [better]
    assert thin(range(100), 4) == [0, 33, 66, 99]  # type: ignore[arg-type,comparison-overlap]


def test_says_where_a_single_model_is_better() -> None:
    singles = tuple(evaluate(SCORES, (name,), 0.0) for name in ("small", "medium", "large"))
    bad, good = evaluate(SCORES, ("small", "large"), 1.1), evaluate(SCORES, ("small", "large"), 0.5)
    curve = Curve(num_calibration=4, singles=singles, points=(good, bad), chosen=bad)
    assert (curve.better_single(good), curve.better_single(bad)) == (None, "large")
    assert curve.verdicts() == [
        "1 of 2 cascades are worse than large alone: no cheaper, no better.",
        "Use large alone instead of the cascade chosen: 100.00 % for 100 MACs.",
    ]
    just = bad.model_copy(update={"mean_macs": singles[2].mean_macs, "accuracy": singles[2].accuracy})
    assert curve.better_single(just) == "large"  # as accurate for the same
    remarks = [row[1] for row in curve.table.rows]
    assert remarks == ["alone", "alone", "alone", "", "worse than large", "chosen"]
    many = curve.model_copy(update={"points": (good,) * 20}).table
    assert (len(many.rows), many.notes, curve.table.notes) == (16, ("12 of 20 cascades, evenly spaced",), ())
    better = curve.model_copy(update={"chosen": good, "points": (good,)})
    assert better.verdicts() == ["0 of 1 cascades are worse than a single model alone: no cheaper, no better."]


@pytest.mark.parametrize("shared", [0, 5])
def test_says_what_an_image_that_goes_on_costs(shared: int) -> None:
    scores = replace(SCORES, shared={("small", "large"): shared})
    curves = {
        threshold: Curve(
            num_calibration=4,
            singles=(evaluate(scores, ("large",), 0.0),),
            points=(evaluate(scores, ("small", "large"), threshold),),
        )
        for threshold in (0.0, 1.1)
    }
    assert curves[0.0].reading == "No image goes on: the first model of each cascade is confident of all of them."
    goes_on = "A model goes on from where the one in front parted" if shared else "they part at the image."
    assert goes_on in curves[1.1].reading


@pytest.fixture(scope="module")
def net() -> detachnet.DetachableNet:
    """Its classifier is scaled so that confidences differ."""
    torch.manual_seed(0)
    net = make()
    torch.nn.init.normal_(net.base.classifier.weight, 0, 3)
    return net


def split_of(net: detachnet.DetachableNet, n: int = 60) -> Split:
    """Random images, labelled with what the base-model says."""
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = net((images / 255 - 0.5) / 0.2, which="base").argmax(1)
    return Split(images, labels, ("a", "b"))


@pytest.mark.slow
def test_running_a_cascade_is_what_was_calculated(net: detachnet.DetachableNet) -> None:
    split = split_of(net)
    scores = score(net, split)
    assert scores.right["base"].all()
    images = (split.images / 255 - 0.5) / 0.2
    family = Family(TorchBackend(net), "f", None)
    threshold = float(torch.cat([scores.confidence["sub1"], scores.confidence["sub0"]]).median()) + 1e-4
    for models in (("sub1", "base"), ("sub1", "sub0", "base"), ("sub0",)):
        point = evaluate(scores, models, threshold)
        answer = Cascade(family, models, threshold).run(images)
        assert {name: answer.models.count(name) / 60 for name in models} == pytest.approx(point.shares)
        assert answer.macs / 60 == pytest.approx(point.mean_macs)
        assert float((answer.output.argmax(1) == split.labels).double().mean()) == pytest.approx(point.accuracy)
        for i, name in enumerate(answer.models):
            torch.testing.assert_close(answer.output[i], family.run(images[i], name).output, rtol=1e-3, atol=1e-3)


def test_confidence_is_that_of_the_calibration_in_other_precisions_too(net: detachnet.DetachableNet) -> None:
    half, split = copy.deepcopy(net).bfloat16(), split_of(net)
    confidence = score(half, split).confidence["sub1"]
    images, family = ((split.images / 255 - 0.5) / 0.2).bfloat16(), Family(TorchBackend(half), "f", None)
    for threshold in confidence.tolist():
        cascade = Cascade(family, ("sub1", "base"), threshold)
        assert cascade.run(images).models.count("sub1") == int((confidence >= threshold).sum())
    for image in images[:10]:
        shares = family.run(image, "sub1").output.float().softmax(0)
        assert Cascade(family, ("sub1", "base"), float(shares.amax())).run(image).models == ("sub1",)
        above = float(torch.nextafter(shares.amax(), torch.tensor(2.0)))
        assert Cascade(family, ("sub1", "base"), above).run(image).models == ("base",)


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_one_image_has_the_answer_that_it_has_in_a_batch(net: detachnet.DetachableNet, threshold: float) -> None:
    image = torch.randn(net.plan.input_size)
    cascade = Cascade(Family(TorchBackend(net), "f", None), ("sub1", "base"), threshold)
    one, batch = cascade.run(image), cascade.run(image[None])
    assert (one.models, one.macs) == (batch.models, batch.macs)
    assert one.models == ("base" if threshold else "sub1",)
    torch.testing.assert_close(one.output, batch.output[0])


def test_no_images_have_no_answers(net: detachnet.DetachableNet) -> None:
    cascade = Cascade(Family(TorchBackend(net, 1), "f", None), net.names[::-1], 0.5)
    answer = cascade.run(torch.randn(0, *net.plan.input_size))
    assert (answer.models, answer.output.shape, answer.macs) == ((), (0, 10), 0)


def test_as_confident_as_the_threshold_is_confident_enough(net: detachnet.DetachableNet) -> None:
    """Thresholds are confidences of images, so that it happens."""
    images = (split_of(net).images / 255 - 0.5) / 0.2
    family = Family(TorchBackend(net), "f", None)
    confidence = family.resumable(images).run("sub1").output.softmax(1).amax(1)
    threshold = float(confidence[7])
    answer = Cascade(family, ("sub1", "base"), threshold).run(images)
    assert answer.models[7] == "sub1"
    assert answer.models.count("sub1") == int((confidence >= threshold).sum())
    behind = answer.models.count("base") * net.plan["base"].macs
    assert answer.macs == len(images) * net.plan["sub1"].macs + behind


def routes() -> detachnet.DetachableNet:
    """A family that shares its front."""
    torch.manual_seed(0)
    subs = {"late": ["features.16:features.22"], "later": ["features.26:features.32", "features.36:features.42"]}
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(
        model, {n: detachnet.SubModel(drop=drop) for n, drop in subs.items()}, check="none"
    ).eval()
    torch.nn.init.normal_(net.base.classifier.weight, 0, 3)
    net.facts = net.facts.updated(data=DATA)
    return net


@pytest.mark.slow
def test_a_cascade_goes_on_from_where_models_part(monkeypatch: pytest.MonkeyPatch) -> None:
    net = routes()
    scores, images = score(net, split_of(net)), (split_of(net).images / 255 - 0.5) / 0.2
    family = Family(TorchBackend(net), "f", None)
    assert scores.shared["late", "base"] == net.plan["late"].shared_macs > 0
    threshold = float(torch.cat([scores.confidence["late"], scores.confidence["later"]]).median()) + 1e-4
    for models in (("late", "base"), ("late", "later", "base"), ("later", "base")):
        point = evaluate(scores, models, threshold)
        assert point.mean_macs < point.mean_macs_apart
        calls: Counter[object] = Counter()
        run_leg = TorchBackend.run_leg

        def counted(backend: TorchBackend, leg: Leg, value: torch.Tensor) -> torch.Tensor:
            calls[leg] += len(value)  # noqa: B023
            return run_leg(backend, leg, value)  # noqa: B023

        monkeypatch.setattr(TorchBackend, "run_leg", counted)
        answer = Cascade(family, models, threshold).run(images)
        monkeypatch.setattr(TorchBackend, "run_leg", run_leg)
        assert answer.macs / 60 == pytest.approx(point.mean_macs)
        assert answer.macs == sum(leg.macs * count for leg, count in calls.items())
        for i, name in enumerate(answer.models):
            torch.testing.assert_close(answer.output[i], family.run(images[i], name).output, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_table_says_what_going_on_saves() -> None:
    net = routes()
    curve = calibrate(net, split_of(net))
    assert curve.reuses
    assert "from the image" in curve.table.header
    assert all(len(row) == len(curve.table.header) for row in curve.table.rows)
    assert all(point.mean_macs <= point.mean_macs_apart for point in curve.points)


@pytest.mark.parametrize("models", [(), ("sub9",)])
def test_a_cascade_of_nothing(net: detachnet.DetachableNet, models: tuple[str, ...]) -> None:
    with pytest.raises(detachnet.CutError, match="a cascade is made of base, sub0, sub1, not of"):
        Cascade(Family(TorchBackend(net), "f", None), models, 0.5)


@pytest.mark.parametrize("threshold", ["0.9", None, float("nan")])
def test_a_threshold_is_a_number(net: detachnet.DetachableNet, threshold: float) -> None:
    with pytest.raises(detachnet.BudgetError, match=r"threshold is a share such as .*, not"):
        Cascade(Family(TorchBackend(net), "f", None), ["sub0", "base"], threshold)


def test_calibration_and_report_are_disjoint(net: detachnet.DetachableNet) -> None:
    split = split_of(net)
    split.labels[1::2] = (split.labels[1::2] + 1) % 10  # the base-model is right on even images only
    curve = calibrate(net, split, target_accuracy=0.99)
    assert (curve.num_calibration, curve.singles[0].n) == (30, 30)
    assert curve.singles[-1].accuracy == 0.0
    assert curve.chosen is not None
    assert curve.chosen.models[-1] == "base"
    assert curve.chosen.accuracy < 0.5


def test_shares_are_of_the_base_model_where_that_was_not_trained(net: detachnet.DetachableNet) -> None:
    net, split, sub = net.copied(), split_of(net), net.names[1]
    net.facts = net.facts.updated(trained=(sub,))
    curve = calibrate(net, split)
    share = f"{100 * net.plan[sub].macs / net.plan['base'].macs:.0f} %"
    assert [row[5] for row in curve.table.rows if row[0] == sub] == [share] != ["100 %"]
    with pytest.raises(detachnet.BudgetError, match=f"two models at least; only {sub} was trained"):
        calibrate(net, split, target_accuracy=0.5)


def drawn(n: int = 24) -> Scores:
    """Two kinds of images in turn: of the second ones every model knows less."""
    generator = torch.Generator().manual_seed(4)
    macs, confidence, right = {"large": 100, "medium": 50, "small": 10}, {}, {}
    for name, share in (("large", 0.9), ("medium", 0.75), ("small", 0.6)):
        confidence[name] = torch.rand(n, generator=generator)
        luck = torch.rand(n, generator=generator)
        luck[1::2] += 0.25
        right[name] = luck < share * (0.6 + 0.6 * confidence[name])
    return Scores(confidence, right, macs)


def by_hand(scores: Scores, first: int, chain: tuple[str, ...], threshold: float) -> tuple[float, float]:
    """Accuracy and MACs per image of every other image, one after another."""
    right = spent = count = 0
    for i in range(first, scores.num_images, 2):
        count += 1
        for name in chain:
            spent += scores.macs[name]
            if scores.confidence[name][i] >= threshold or name == chain[-1]:
                right += bool(scores.right[name][i])
                break
    return right / count, spent / count


def test_chosen_on_the_first_half_measured_on_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside every chain at every threshold, tried one by one."""
    scores = drawn()
    monkeypatch.setattr(cascade, "score", lambda *_: scores)
    images = Split(torch.zeros(24, 3, 2, 2), torch.zeros(24), ())
    chains = [("small", "medium"), ("small", "large"), ("medium", "large"), ("small", "medium", "large")]
    tried = {
        (chain, threshold): by_hand(scores, 0, chain, threshold)
        for chain in chains
        for threshold in torch.cat([scores.confidence[name][::2] for name in chain[:-1]]).double().tolist()
    }
    for target in (0.6, 0.75, max(accuracy for accuracy, _ in tried.values())):
        curve = calibrate(None, images, target_accuracy=target)  # type: ignore[arg-type]
        chosen = curve.chosen
        assert chosen is not None
        accuracy, macs = by_hand(scores, 0, chosen.models, chosen.threshold)
        assert accuracy >= target
        assert macs == min(macs for accuracy, macs in tried.values() if accuracy >= target)
        assert (chosen.accuracy, chosen.mean_macs) == by_hand(scores, 1, chosen.models, chosen.threshold)
        assert chosen.n == 12
    for target in (40, 70, 100):
        chosen = calibrate(None, images, target_macs=target).chosen  # type: ignore[arg-type]
        assert chosen is not None
        accuracy, macs = by_hand(scores, 0, chosen.models, chosen.threshold)
        assert macs <= target
        assert accuracy == max(accuracy for accuracy, macs in tried.values() if macs <= target)
        assert (chosen.accuracy, chosen.mean_macs) == by_hand(scores, 1, chosen.models, chosen.threshold)
    assert [single.models[0] for single in curve.singles] == ["small", "medium", "large"]
    for point in (*curve.singles, *curve.points):
        assert (point.accuracy, point.mean_macs) == by_hand(scores, 1, point.models, point.threshold)
    assert {by_hand(scores, 0, point.models, point.threshold) for point in curve.points} == {
        (accuracy, macs)
        for accuracy, macs in tried.values()
        if not any(a >= accuracy and m <= macs and (a, m) != (accuracy, macs) for a, m in tried.values())
    }


def test_targets(net: detachnet.DetachableNet) -> None:
    split = split_of(net)
    macs = {name: net.plan[name].macs for name in net.names}
    chosen = calibrate(net, split, target_macs=1.2 * macs["sub1"]).chosen
    assert chosen is not None
    assert chosen.models[0] == "sub1"
    with pytest.raises(
        detachnet.BudgetError, match=r"no cascade reaches 100 MACs per image on the 30 calibration"
    ):
        calibrate(net, split, target_macs=100)
    with pytest.raises(detachnet.BudgetError, match=r"no cascade reaches[\s\S]*a single model does: sub1"):
        calibrate(net, split, target_macs=macs["sub1"])
    split.labels[:] = (split.labels + 1) % 10
    with pytest.raises(detachnet.BudgetError, match=r"no cascade reaches 95.00 %[\s\S]*the nearest has"):
        calibrate(net, split, target_accuracy=0.95)


def test_refusals(net: detachnet.DetachableNet) -> None:
    split = split_of(net, 1)
    with pytest.raises(detachnet.BudgetError, match="one target: an accuracy or mean MACs, not both"):
        calibrate(net, split, 0.5, 1e6)
    with pytest.raises(detachnet.BudgetError, match=r"accuracy=80 is not a share"):
        calibrate(net, split, 80)
    with pytest.raises(detachnet.DataError, match="1 images cannot be divided"):
        calibrate(net, split)
    split = split_of(net, 4)
    with pytest.raises(detachnet.DataError, match=r"images are a Split here, .* not a DataLoader"):
        calibrate(net, DataLoader(TensorDataset(split.images, split.labels)))  # type: ignore[arg-type]
    with pytest.raises(detachnet.DataError, match=r"images of a Split are .* uint8, not .*float32"):
        calibrate(net, Split(split.images / 255, split.labels, split.classes))
    with pytest.raises(detachnet.DataError, match="the classes of the images are in another order"):
        calibrate(net, Split(split.images, split.labels, split.classes[::-1]))
    bare = make()
    bare.facts = bare.facts.updated(data=None)
    with pytest.raises(detachnet.CheckpointError, match="does not say what it was trained on"):
        calibrate(bare, split_of(net, 2))


def test_the_family_comes_back_as_it_was(net: detachnet.DetachableNet) -> None:
    net.train()
    score(net, split_of(net, 4))
    assert all(module.training for module in net.modules())
    net.eval()


@pytest.mark.slow
def test_command(net: detachnet.DetachableNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detachnet.data.datasets.load_data", lambda *_: (split_of(net), split_of(net)))
    detachnet.save(net, tmp_path / "last.safetensors")
    done = CliRunner().invoke(app, ["cascade", str(tmp_path), "--target-accuracy", "0.5"])
    assert done.exit_code == 0, done.output
    assert re.search(r"sub1 → \S+ .* chosen", done.output)
    assert re.search(r"base +alone +100 % .* 100 % +100.00 %", done.output)
    assert "Chosen on 30 test images; the figures are of the other 30" in done.output
    assert re.search(r"\d+ of \d+ cascades are worse than", done.output)
    out = json.loads(CliRunner().invoke(app, ["cascade", str(tmp_path), "--json"]).stdout)
    assert len(out["worse_than"]) == len(out["points"])
    assert out["chosen"] is None
    done = CliRunner().invoke(app, ["cascade", str(tmp_path), "--target-accuracy", "80"])
    assert (done.exit_code, "accuracy=80 is not a share" in done.output) == (2, True)
    facts, net.facts = net.facts, net.facts.updated(data=None)
    detachnet.save(net, tmp_path / "bare.safetensors")
    net.facts = facts
    done = CliRunner().invoke(app, ["cascade", str(tmp_path / "bare.safetensors")])
    assert (done.exit_code, "does not say what it was trained on" in done.output) == (2, True)
