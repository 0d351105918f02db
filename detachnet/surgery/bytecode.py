"""code of Python -> what it does, as its steps tell."""

from __future__ import annotations

import dis
import inspect
from functools import lru_cache
from itertools import pairwise
from types import CodeType
from typing import Any

import torch


def steps_of(forward: Any) -> list[dis.Instruction]:
    """Of a function of Python."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return list(dis.get_instructions(code)) if code else []


@lru_cache
def has_effect(forward: Any) -> bool:
    """Whether code assigns an attribute or an item, raises, or calls something for no result."""
    steps = [step.opname for step in steps_of(forward)]
    calls = any(one.startswith("CALL") and two == "POP_TOP" for one, two in pairwise(steps))
    return calls or not {"STORE_ATTR", "STORE_SUBSCR", "RAISE_VARARGS"}.isdisjoint(steps)


def gives_something(function: Any) -> bool:
    """Whether code returns anything but None."""
    steps = [(step.opname, step.argval) for step in steps_of(function)]
    return any(one != ("LOAD_CONST", None) for one, two in pairwise(steps) if two[0] == "RETURN_VALUE")


@lru_cache
def compares_dtypes(code: CodeType) -> bool:
    """Whether code asks if something *is* a dtype, which no traced value can answer."""
    steps = list(dis.get_instructions(code))
    named = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)} | {"dtype"}
    compared = (
        [step.argval for step in steps[i - 3 : i]] for i, step in enumerate(steps) if step.opname == "IS_OP"
    )
    return any(before[-1] is not None and not named.isdisjoint(map(str, before)) for before in compared)
