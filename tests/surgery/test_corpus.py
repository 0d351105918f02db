"""Generated networks: a family is the network, or is refused, or its plan says how it differs."""

from functools import partial

import pytest

import detachnet
from tests.surgery import corpus


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [100, 1000, 2000])
def test_a_family_is_the_network_or_says_that_it_is_not(first: int) -> None:
    """Ten networks each; `python -m tests.surgery.corpus` tries a thousand."""
    for seed in range(first, first + 10):
        source, asked = corpus.written(seed)
        verdict, said = corpus.judge(source, f"corpus_{seed}", asked)
        assert verdict in ("equal", "refused", "named", "unfit"), (seed, said)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("h = h * (1 if type(h) is torch.Tensor else 2)", "base: output 0"),
        ("h = h * 2", ""),
    ],
)
def test_the_comparison_sees_what_is_lost(statement: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library compares nothing itself."""
    monkeypatch.setattr(detachnet, "make_detachable", partial(detachnet.make_detachable, check="none"))
    children = "self.stem, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)"
    body = "\n".join(
        f"        {line}" for line in ("h = self.stem(x)", statement, "return self.fc(h.mean((2, 3)))")
    )
    net = corpus.PART.format(
        name="Net", children=children, extra="pass", hooks="pass", taken="x", taps="", body=body
    )
    verdict, said = corpus.judge(corpus.HEADER + corpus.HELPERS + net, "corpus_seen", {"cuts": ["stem"]})
    assert verdict == ("silent" if seen else "equal"), said
    assert said.startswith(seen)
