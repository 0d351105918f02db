"""one model's graph -> DetachedModel: a plain module that runs without its family and without torch.fx."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from detachnet.surgery.codegen import compile_source
from detachnet.surgery.modules import put


class DetachedModel(nn.Module):
    """One model of a family, alone; what `DetachableNet.detach` makes of a sub-model.

    An ordinary module: its step-down is `stepdown`, everything else has the base-model's names. It pickles,
    copies, compiles, exports and prints like any other. (A `torch.fx.GraphModule` is traced a second time when it
    is unpickled, and fails or bakes decisions in where `make_detachable` knew better.)

    Args:
        name: The model's, shown when it is printed.
        source: Its forward pass, as torch.fx writes it.
        scope: What the source refers to.
        parts: Dotted name → module, parameter or buffer.
    """

    def __init__(self, name: str, source: str, scope: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        super().__init__()
        self._name, self._source, self._scope = name, source, dict(scope)
        self._run = compile_source(source, scope, name)
        for path, part in parts.items():
            put(self, path, part)

    def forward(self, x: Tensor) -> Any:
        """What the base-model returns, `(B, num_classes)` for a classifier, of images `(B, C, H, W)`."""
        return self._run(self, x)

    def _get_name(self) -> str:
        return self._name

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_run"]
        modules = {key: value.__name__ for key, value in self._scope.items() if isinstance(value, ModuleType)}
        rest = {key: value for key, value in self._scope.items() if key not in modules}
        return state | {"_scope": rest, "_modules_of_scope": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {key: import_module(name) for key, name in state.pop("_modules_of_scope").items()}
        state["_scope"] = state["_scope"] | modules
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._run = compile_source(self._source, self._scope, self._name)
