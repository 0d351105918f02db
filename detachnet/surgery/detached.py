"""one model's graph -> DetachedModel: a plain module that runs without its family and without torch.fx."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from detachnet.surgery.codegen import compile_source
from detachnet.surgery.modules import put

logger = logging.getLogger("detachnet")


@dataclass
class Code:
    """A forward pass that pickles: modules that it refers to by their names.

    Attributes:
        source: As torch.fx writes it.
        scope: What the source refers to.
    """

    source: str
    scope: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        modules = {key: value.__name__ for key, value in self.scope.items() if isinstance(value, ModuleType)}
        rest = {key: value for key, value in self.scope.items() if key not in modules}
        return {"source": self.source, "scope": rest, "modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {key: import_module(name) for key, name in state["modules"].items()}
        self.source, self.scope = state["source"], state["scope"] | modules


class DetachedModel(nn.Module):
    """One model of a family, alone; what `DetachableNet.detach` makes of a sub-model.

    An ordinary module: its step-down is `stepdown`, everything else has the base-model's names. It pickles,
    copies, compiles, exports and prints like any other. (A `torch.fx.GraphModule` is traced a second time when it
    is unpickled, and fails or bakes decisions in where `make_detachable` knew better.)

    Args:
        name: The model's, shown when it is printed.
        code: Its forward pass.
        parts: Dotted name → module, parameter or buffer.
        in_training: Its forward pass in training mode.
        only_in_training: Parts that the base-model runs in training mode only; then there is no such pass.
        others: Names of parts that the base-model keeps in the other mode, in evaluation and in training.
    """

    def __init__(
        self,
        name: str,
        code: Code,
        parts: Mapping[str, Any],
        in_training: Code | None = None,
        only_in_training: Sequence[str] = (),
        others: Sequence[Sequence[str]] = ((), ()),
    ) -> None:
        super().__init__()
        self._name, self._code, self._only_in_training = name, code, tuple(only_in_training)
        self._code_in_training = code if in_training is None or only_in_training else in_training
        self._compile()
        for path, part in parts.items():
            put(self, path, part)
        there = dict(self.named_modules())
        self._others = [[path for path in paths if path in there] for paths in others]

    def _compile(self) -> None:
        codes = self._code, self._code_in_training
        self._run, self._run_in_training = (compile_source(c.source, c.scope, self._name) for c in codes)

    def train(self, mode: bool = True) -> DetachedModel:
        """Set the mode; it is told once where the base-model trains with more layers than there are here."""
        if mode and self._only_in_training:
            names, self._only_in_training = ", ".join(map(repr, self._only_in_training)), ()
            logger.warning("%s has no %s, which its base-model has in training mode", self._name, names)
        super().train(mode)
        for path in self._others[mode]:
            self.get_submodule(path).training = not mode
        return self

    def forward(self, x: Tensor) -> Any:
        """What the base-model returns, `(B, num_classes)` for a classifier, of images `(B, C, H, W)`."""
        return self._run_in_training(self, x) if self.training else self._run(self, x)

    def _get_name(self) -> str:
        return self._name

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_run"], state["_run_in_training"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()
