import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detachnet_cli.app import app
from torch import nn
from typer.testing import CliRunner

import detachnet
from detachnet.deploy import peak, profile as measure
from detachnet.deploy.manifest import read_manifest
from detachnet.deploy.profile import Profile, alternate, profile, profile_of, read_profile, write_profile
from detachnet.storage import locate, locate_checkpoint


@pytest.fixture(scope="module")
def net() -> detachnet.DetachableNet:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(model, ["features.6", "features.23"], check="none")
    net.facts = net.facts.updated(accuracy={"base": 0.9, "sub1": 0.6})
    return net


def quick(net: detachnet.DetachableNet, **kwargs: int) -> Profile:
    return profile(net, n=3, warmup=1, peak_memory=False, **kwargs)


def test_models_are_run_in_turn_and_each_run_is_timed_alone() -> None:
    ran: list[str] = []
    ticks = iter(range(1000))
    seconds = alternate({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3, 2, lambda: next(ticks))
    assert "".join(ran) == "ab" * 5
    assert seconds == {"a": [1, 1, 1], "b": [1, 1, 1]}


@pytest.mark.slow
def test_percentiles_and_throughput(net: detachnet.DetachableNet, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.1] * 50 + [0.2] * 45 + [1.0] * 5
    monkeypatch.setattr(measure, "alternate", lambda runs, n, warmup: dict.fromkeys(runs, seconds))
    row = profile(net, batch=4, peak_memory=False)["sub0"]
    assert (row.p50_s, row.p90_s, row.p99_s) == pytest.approx((0.15, 0.2, 1.0))
    assert row.images_per_s == pytest.approx(4 * 100 / (5 + 9 + 5))


def test_what_is_counted_is_exact(net: detachnet.DetachableNet) -> None:
    measured = quick(net, batch=2, threads=1)
    assert [row.model for row in measured.rows] == list(net.names)
    for row in measured.rows:
        alone = net.detach(row.model)
        assert row.macs == net.plan[row.model].macs
        assert row.num_params == sum(p.numel() for p in alone.parameters())
        assert row.num_bytes == sum(t.nbytes for t in alone.state_dict().values())
        assert (row.runtime, row.device, row.batch, row.threads, row.n) == ("torch", "cpu", 2, 1, 3)
        assert 0 < row.p50_s <= row.p90_s <= row.p99_s
    assert [row.accuracy for row in measured.rows] == [0.9, None, 0.6]
    assert measured.versions["torch"] == torch.__version__.partition("+")[0]
    assert "90.00 %" in str(measured)


@pytest.mark.slow
def test_the_family_and_torch_come_back_as_they_were(net: detachnet.DetachableNet) -> None:
    net.train()
    net.base.features[1].eval()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    quick(net, threads=threads + 1)
    assert [module.training for module in net.modules()] == modes
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.fx.Proxy) and self.training is False and Failing.armed:
            raise ValueError("on purpose")
        return x

    armed = False


def test_after_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Failing(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    net = detachnet.make_detachable(model, ["0"], (3, 8, 8), leaf_modules=[Failing]).train()
    threads = torch.get_num_threads()
    monkeypatch.setattr(Failing, "armed", True)
    with pytest.raises(ValueError, match="on purpose"):
        quick(net, threads=threads + 1)
    assert all(module.training for module in net.modules())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch": 0}, "batch=0: it is at least 1"),
        ({"threads": 0}, "threads=0: it is at least 1"),
        ({"n": 0}, "n=0: it is at least 1"),
        ({"warmup": -1}, "warmup=-1: it is at least 0"),
        ({"batch": 1.5}, "batch=1.5: it is a whole number"),
        ({"device": nn.Identity()}, "this machine has no device Identity"),
        ({"device": "tpu"}, "this machine has no device 'tpu'"),
    ],
)
def test_settings_are_checked(net: detachnet.DetachableNet, kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(detachnet.MeasurementError, match=re.escape(message)):
        profile(net, **kwargs)


def test_a_changed_network_of_the_zoo_is_measured_without_its_memory() -> None:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    model.features[1].eps = 1e-3  # type: ignore[union-attr]
    net = detachnet.make_detachable(model, ["features.6"], check="none")
    measured = profile(net, n=1, warmup=0)
    assert all(row.p50_s > 0 for row in measured.rows)
    assert re.search("not measured: .*was changed afterwards", measured.memory)


def test_the_profile_of_another_family_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "same.safetensors"
    nets = [
        detachnet.make_detachable(
            detachnet.create_model("detachnet:vgg16_cifar", width=width), ["features.6"], check="none"
        )
        for width in (0.05, 0.1)
    ]
    for net in nets:
        detachnet.save(net, path)
        if net is nets[0]:
            write_profile(profile(net, n=1, warmup=0, peak_memory=False), path)
            assert profile_of(net, path) is not None
    assert profile_of(nets[1], path) is None
    assert "same.profile.json was measured on another family than" in caplog.text
    result = CliRunner().invoke(app, ["export", str(path), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "out")["base"].latency is None


def test_a_model_that_was_not_measured(net: detachnet.DetachableNet) -> None:
    measured = profile(net, n=1, warmup=0, peak_memory=False)
    assert measured["base"].model == "base"
    with pytest.raises(detachnet.MeasurementError, match=r"no model 'bas'[\s\S]*nearest  'base'"):
        measured["bas"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_cuda(net: detachnet.DetachableNet) -> None:
    with pytest.raises(detachnet.MeasurementError, match=r"no device 'cuda'[\s\S]*device='cpu'"):
        profile(net, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(net: detachnet.DetachableNet) -> None:
    measured = profile(net, "cuda", batch=64, n=5, warmup=2)
    assert next(net.parameters()).device.type == "cpu"
    for row in measured.rows:
        assert row.peak_memory_bytes is not None
        assert row.peak_memory_bytes > row.num_bytes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_memory_that_is_made_and_memory_that_is_used_count() -> None:
    """In a process of its own, as models are: this one may have kept what it freed."""
    code = """
from detachnet.memory import measure_here

def prepare():
    kept = bytearray(b"x") * 30_000_000
    return lambda: len(bytearray(b"y") * 20_000_000 + kept[:1])

print(measure_here(prepare))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(50_000_000 + 20_000_001, rel=0.1)


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_peak_memory_holds_weights_and_activations() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64 * 64, 400), nn.Linear(400, 5))
    net = detachnet.make_detachable(wide, ["2"], (3, 64, 64))
    assert profile(net, n=1, warmup=0).memory.startswith("not measured: a process of its own cannot build")
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.5)
    net = detachnet.make_detachable(model, ["features.6"], check="none")
    measured = profile(net, n=1, warmup=0, batch=16)
    for row in measured.rows:
        assert row.peak_memory_bytes is not None
        assert row.num_bytes < row.peak_memory_bytes < 10 * row.num_bytes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_a_process_that_fails_is_no_measurement(tmp_path: Path) -> None:
    peaks, how = peak.resident_peaks("torch", tmp_path / "nothing", ["base"], 1, 1)
    assert peaks == {}
    assert re.search(r"not measured: the process of base failed: .*there is no file", how)


def test_where_a_profile_lives(tmp_path: Path) -> None:
    assert locate(tmp_path / "best.safetensors").profile == tmp_path / "best.profile.json"
    assert locate(tmp_path / "net.v2").profile == tmp_path / "net.v2.profile.json"
    with pytest.raises(detachnet.CheckpointError, match=r"it has no last\.safetensors and no manifest\.json"):
        locate(tmp_path)
    (tmp_path / "manifest.json").touch()
    assert locate(tmp_path).profile == tmp_path / "profile.json"
    with pytest.raises(detachnet.CheckpointError, match="it is an export; give the checkpoint it was made from"):
        locate_checkpoint(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "last.safetensors").touch()
    assert locate(tmp_path).profile == tmp_path / "last.profile.json"


def test_round_trip_of_the_file(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    path = tmp_path / "family.safetensors"
    assert read_profile(path) is None
    measured = quick(net)
    assert write_profile(measured, path) == tmp_path / "family.profile.json"
    assert read_profile(path) == measured


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", ""),
        ('{"format_version": 2}', "format_version is 2: it must be one of 1"),
        ("[]", "it must be a table"),
    ],
)
def test_a_damaged_profile(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "family.profile.json").write_text(text)
    with pytest.raises(
        detachnet.MeasurementError,
        match=rf"is not a profile this version reads[\s\S]*{said}[\s\S]*detachnet profile",
    ):
        read_profile(tmp_path / "family.safetensors")


@pytest.fixture
def checkpoint(net: detachnet.DetachableNet, tmp_path: Path) -> Path:
    detachnet.save(net, tmp_path / "last.safetensors")
    return tmp_path / "last.safetensors"


@pytest.mark.slow
def test_command(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "resident_peaks", lambda *_: ({"base": 5_000_000}, "how"))
    done = CliRunner().invoke(app, ["profile", str(checkpoint.parent), "--n", "3", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert re.search(r"base +\S+ [kM] .* 5\.0 +90\.00 %", done.output)
    assert re.search(r"sub0 .* – +–", done.output)
    assert "last.profile.json" in done.output
    done = CliRunner().invoke(app, ["profile", str(checkpoint), "--n", "3", "--json"])
    assert Profile.model_validate(json.loads(done.stdout)) == read_profile(checkpoint)


def test_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["profile", str(tmp_path / "no.safetensors")])
    assert (done.exit_code, "there is no file" in done.output) == (2, True)
