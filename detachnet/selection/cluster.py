"""Many machines: a Ray cluster as an executor of `concurrent.futures`, which `search` takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from detachnet.errors import MeasurementError

P = ParamSpec("P")
T = TypeVar("T")


class RayExecutor(Executor):
    """Runs calls on a Ray cluster: the one this process is in; else that of `RAY_ADDRESS`, or one on this machine.

    A function is sent once, not with every call.

    Args:
        workers: Calls at a time of a cluster that is started here; as many as there are cores by default.

    Raises:
        MeasurementError: Ray is not installed.

    Examples:
        >>> with RayExecutor() as executor:
        ...     front = detachnet.search(net, held_out, [0.6, 0.3], executor=executor)
    """

    def __init__(self, workers: int | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise MeasurementError(
                "a Ray cluster needs ray, which is not installed", hint="pip install 'detachnet[ray]'"
            )
        import ray

        self._ray = ray
        self._is_own = not ray.is_initialized()
        if self._is_own:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="warning")
        self._call = ray.remote(_call)
        self._sent: dict[int, tuple[Callable[..., Any], Any]] = {}

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in a process of the cluster."""
        if id(fn) not in self._sent:
            self._sent[id(fn)] = fn, self._ray.put(fn)
        future: Future[T] = self._call.remote(self._sent[id(fn)][1], args, kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - as they are
        """Leave the cluster, and stop it, if it was started here."""
        self._sent.clear()
        if self._is_own and self._ray.is_initialized():
            self._ray.shutdown()


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a process of the cluster does."""
    return function(*args, **kwargs)
