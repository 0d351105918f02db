"""one model's graph -> DetachedModel: a plain module that runs without its family and without torch.fx."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import count
from types import ModuleType
from typing import Any

from torch import Tensor, fx, nn

Run = Callable[[nn.Module, Tensor], Any]
_number = count()


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


class Folder(nn.Module):
    """Only holds submodules, so that a part sits under its original dotted path."""


def put(root: nn.Module, path: str, part: nn.Module | Tensor) -> None:
    """Set `root.<path>`, making the folders on the way."""
    *folders, last = path.split(".")
    for folder in folders:
        if folder not in root._modules:
            root.add_module(folder, Folder())
        root = root.get_submodule(folder)
    if isinstance(part, nn.Module):
        root.add_module(last, part)
    elif isinstance(part, nn.Parameter):
        root.register_parameter(last, part)
    else:
        root.register_buffer(last, part)


def compile_graph(graph: fx.Graph, label: str) -> Run:
    """A graph as a function of (module, images)."""
    code = graph.python_code("self")
    return compile_source(code.src, code.globals, label)


def compile_source(source: str, scope: Mapping[str, Any], label: str) -> Run:
    """A forward pass as a function of (module, images), with its source where tracebacks look for it."""
    filename = f"<detachnet {label} {next(_number)}>"
    names = dict(scope)
    tree = ast.fix_missing_locations(_DirectCalls().visit(ast.parse(source)))
    exec(compile(tree, filename, "exec"), names)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    return names["forward"]  # type: ignore[no-any-return]


class _DirectCalls(ast.NodeTransformer):
    """Calls of layers, `self.a.b(x)`, take them from `_modules`: a step of `nn.Module.__getattr__` is half a
    microsecond, which tells in small models. Tracebacks show the source as it was."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """A layer is all that torch.fx calls on `self`."""
        self.generic_visit(node)
        if path := _path(node.func):
            node.func = ast.parse("self" + "".join(f"._modules[{part!r}]" for part in path), mode="eval").body
            ast.copy_location(node.func, node)
        return node


def _path(target: ast.expr) -> list[str]:
    """`["a", "0"]` of `getattr(self.a, "0")`; nothing for what is not below `self`."""
    match target:
        case ast.Attribute(value, name) | ast.Call(ast.Name("getattr"), [value, ast.Constant(str(name))]):
            above = _path(value)
            return [*above, name] if above or _is_self(value) else []
    return []


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
