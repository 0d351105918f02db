"""pt2 archive of anybody's -> the same with nothing in it but tensors and a graph of known operators.

`torch.export.load` runs what an archive asks for: it loads shared libraries, unpickles objects, evaluates the
expressions of symbolic sizes and executes guards. So an archive is read here, checked, and written anew with the
members and fields that detachnet's own have; torch sees only that.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detachnet.errors import ExportError
from detachnet.storage import read_file
from detachnet.text import parse_json

_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(serialization_id|version)|models/model\.json"
    r"|data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json))"
)
_EMPTY = "data/sample_inputs/model.pt"
"""A pickle where there is one; detachnet's archives have it empty."""
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_MODEL = "models/model.json"
_OPERATORS = re.compile(
    r"torch\.ops\.(aten\.(?!from_file\b)|torchvision\.)\w+\.\w+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|getitem)"
    r"|torch\.sym_(max|min|int|float|not|ite)|math\.(ceil|floor|trunc)"
)
"""Operators that compute and do nothing else: none that reads or writes a file."""
_EXPRESSION = re.compile(
    r"(\b(Symbol|Integer|Rational|Mul|Add|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|Mod|PythonMod|Max|Min|Eq|Ne|Le|Lt|Ge|Gt"
    r"|And|Or|Not|True|False|true|false|positive|nonnegative|integer)\b|'[su]\d{1,6}'|\b[su]\d{1,6}\b|\b\d{1,18}\b"
    r"|[(), =+*/<>-])*"
)
"""Of symbolic sizes, which torch has sympy evaluate as Python."""
_SPEC_TEXT = re.compile(r'[A-Za-z_][\w.]*|\[[\w", ]*\]')
"""In the JSON of how arguments are nested: names, and lists of names as text."""
_TEXT = re.compile(r"[\w.,:+\-/ >]*")
_NAME = re.compile(r"\w*")


def clean_archive(path: Path) -> io.BytesIO:
    """A pt2 file without anything that could run.

    Raises:
        ExportError: The file is missing or incomplete, or holds what detachnet never writes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(read_file(path))) as archive:
            members = {name: archive.read(info) for name, info in _members(archive, path)}
        return _written(members, path)
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {path}") from error
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ExportError(f"{path} is no complete pt2 file", what=str(error)) from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is no pt2 archive of this version of torch.export", what=repr(error)) from error


def _members(archive: zipfile.ZipFile, path: Path) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """The members by their names behind the folder that all of them are in."""
    seen: set[str] = set()
    for member in archive.infolist():
        name = member.filename.partition("/")[2]
        is_known = _MEMBERS.fullmatch(name) or (name == _EMPTY and not member.file_size)
        if not is_known or name in seen or member.is_dir():
            raise _foreign(path, member.filename)
        if member.compress_type != zipfile.ZIP_STORED:
            raise _foreign(path, f"{member.filename}, compressed")
        seen.add(name)
        yield name, member
    if "archive_format" not in seen or _MODEL not in seen:
        raise ExportError(f"{path} is no pt2 archive of this version of torch.export")


def _foreign(path: Path, where: str) -> ExportError:
    return ExportError(
        f"{path} holds what detachnet never writes and torch might run; it is not opened",
        where=where,
        hint="open files of your own with torch.export.load",
    )


def _written(members: dict[str, bytes], path: Path) -> io.BytesIO:
    """The archive written anew."""
    for config in _CONFIGS:
        for entry in parse_json(members.get(config, b'{"config": {}}'))["config"].values():
            if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                raise _foreign(path, f"{config}: {entry['path_name']}")
    members[_MODEL] = json.dumps(_clean_model(parse_json(members[_MODEL]), path)).encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    made.seek(0)
    return made


def _clean_model(model: dict[str, Any], path: Path) -> dict[str, Any]:
    """A graph without notes and guards, whose every text is harmless."""
    model["guards_code"] = []
    graph = model["graph_module"]
    graph["metadata"] = {}
    graph["module_call_graph"] = [call for call in graph["module_call_graph"] if call["fqn"] == ""]
    for node in graph["graph"]["nodes"]:
        node["metadata"] = {}
    rules: dict[str, Callable[[str], object]] = {
        "target": _OPERATORS.fullmatch,
        "expr_str": _EXPRESSION.fullmatch,
        "in_spec": _is_spec,
        "out_spec": _is_spec,
        "name": _NAME.fullmatch,
        "forward_arg_names": _NAME.fullmatch,
    }
    for kind, text in _texts(model):
        # a buffer's or parameter's `target` is its dotted name; only a node's is an operator
        if not rules.get(kind, _TEXT.fullmatch)(text):
            raise _foreign(path, f"{_MODEL}: {kind} {text!r}")
    return model


def _is_spec(text: str) -> bool:
    """Whether a text is the JSON of how arguments are nested: names, counts and null in lists and objects."""
    try:
        waiting = [parse_json(text)]
    except ValueError:
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            if not _SPEC_TEXT.fullmatch(value):
                return False
        elif not (value is None or (type(value) is int and 0 <= value <= 9999)):
            return False
    return True


def _texts(value: Any, kind: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a JSON value with the key that it is under, keys too."""
    waiting = [(value, kind, False)]
    while waiting:
        value, kind, is_node = waiting.pop()
        if isinstance(value, str):
            yield ("name_of_tensor" if kind == "target" and not is_node else kind), value
        elif isinstance(value, dict):
            yield from (("key", key) for key in value)
            node = "inputs" in value and "target" in value
            waiting += [(part, key, node) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(part, kind, is_node) for part in value]
