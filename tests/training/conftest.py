import pytest

from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.proof import Check, Proof


@pytest.fixture(autouse=True)
def _unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families are compared with their models elsewhere; here that would be a fifth of the time."""

    def prove(net: DetachableNet, check: Check) -> Proof:
        del net, check
        return Proof("nothing was compared with the model")

    monkeypatch.setattr("detachnet.surgery.making.prove", prove)
