import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.runs import tenth

# A busy machine is no failure, and a test that passed passes again: examples follow from it, not from chance.
settings.register_profile("detachnet", deadline=None, derandomize=True, database=None)
settings.load_profile("detachnet")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is left to the night is slow."""
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals_of_a_terminal() -> Iterator[None]:
    """Signals are handled as where a person runs the tests: a shell's background jobs ignore Ctrl-C, say."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def little_data() -> Iterator[None]:
    """Training runs read every tenth image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detachnet.training.trainer.load_data", tenth)
        yield
