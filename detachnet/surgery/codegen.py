"""A graph as a Python function."""

from __future__ import annotations

import ast
import keyword
import linecache
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import count
from threading import Lock
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

Run = Callable[[nn.Module, Tensor], Any]
_number = count()
_parsing = Lock()
"""Two threads that parse at once can meet an error in Python before 3.11.8: python/cpython issue 106905."""


def compile_graph(graph: fx.Graph, label: str) -> Run:
    """A graph as a function of (module, images)."""
    code = written(graph)
    return compile_source(code.src, code.globals, label)


def written(graph: fx.Graph) -> PythonCode:
    """A graph as Python, in which any name may be a layer's: torch.fx writes `self.class` of one called so."""
    targets = {n: str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    odd = {node: target for node, target in targets.items() if not all(map(_is_plain, target.split(".")))}
    parts = {part: f"<{i}>" for i, part in enumerate({p for target in odd.values() for p in target.split(".")})}
    try:
        for node, target in odd.items():  # what is no name stands in quotes
            node.target = ".".join(p if _is_plain(p) else parts[p] for p in target.split("."))
        code = graph.python_code("self")
    finally:
        for node, target in odd.items():
            node.target = target
    for part, stand_in in parts.items():
        code.src = code.src.replace(f', "{stand_in}")', f", {part!r})")
    return code


def _is_plain(part: str) -> bool:
    """Whether Python reads what torch.fx writes of a name."""
    return part.isascii() and part.isprintable() and not (keyword.iskeyword(part) or {'"', "\\", "<"} & {*part})


def compile_source(source: str, scope: Mapping[str, Any], label: str) -> Run:
    """A forward pass as a function of (module, images), with its source where tracebacks look for it."""
    names = dict(scope)
    exec(_compiled(source, label), names)
    return names["forward"]  # type: ignore[no-any-return]


@lru_cache(maxsize=64)  # copies of a family have the same graphs: the proof makes some ten
def _compiled(source: str, label: str) -> CodeType:
    filename = f"<detachnet {label} {next(_number)}>"
    with _parsing:
        tree = ast.fix_missing_locations(_DirectCalls().visit(ast.parse(source)))
        code = compile(tree, filename, "exec")
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    return code


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
