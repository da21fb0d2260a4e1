"""The names that a restricted pickle may use, and what each stands for: numpy arrays, their types, and bytes.

Each name is a key of a table of functions in this module. No module is imported and no attribute looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_PLAIN_TYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c(?:8|16))")
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")


class RefusedPickleError(ValueError):
    """A pickle that is damaged, too large, or holds more than plain data."""


class Name:
    """Something that a program may name: a function of this module, or the class that numpy's calls mention."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call


class Dtype:
    """The type of an array, while the program builds it."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _PLAIN_TYPE.fullmatch(code):
            raise RefusedPickleError(f"an array has the type {code!r}, expected numbers or bools")
        self.value = np.dtype(code)

    def set_state(self, state: Any) -> None:
        """Set the byte order, the only content of a plain type's state."""
        _, order, *rest = state
        order = order.decode() if isinstance(order, bytes) else order
        if order not in ("<", ">", "=", "|") or rest[:3] != [None, None, None] or len(rest) > 7:
            raise RefusedPickleError(f"an array has a structured type: {state!r}")
        self.value = np.dtype(order + self.value.str[1:])


ARRAY_CLASS = Name()


class Names:
    """The table of names of one pickle, and the memory that its arrays may still use."""

    def __init__(self, max_bytes: int) -> None:
        """Start with the memory limit of all arrays together."""
        self._room = self._max_bytes = max_bytes
        self._table: dict[tuple[str, str], Name] = {
            ("numpy", "ndarray"): ARRAY_CLASS,
            ("numpy", "dtype"): Name(Dtype),
            ("_codecs", "encode"): Name(self._encoded),
            ("__builtin__", "bytes"): Name(_no_bytes),
        }
        for module in _MULTIARRAY:
            self._table[module, "_reconstruct"] = Name(_blank_array)
            self._table[module, "scalar"] = Name(self._scalar)
        for module in _NUMERIC:
            self._table[module, "_frombuffer"] = Name(self.array)

    def look_up(self, module: Any, name: Any) -> Name:
        """What a name stands for.

        Raises:
            RefusedPickleError: It is not in the table.
        """
        known = self._table.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            raise RefusedPickleError(
                f"it refers to {module}.{name}, which is not plain data and could run code. Supported are numpy "
                "arrays, numbers, text, lists, tuples and dicts"
            )
        return known

    def array(self, content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """An array with its own memory, from bytes that fit its shape exactly."""
        if not isinstance(dtype, Dtype) or order not in ("C", "F"):
            raise RefusedPickleError("an array has no type")
        if isinstance(content, str):  # written by Python 2
            content = content.encode("latin1")
        sides = shape if isinstance(shape, tuple) else (shape,)
        if len(sides) > 32 or not all(type(side) is int and side >= 0 for side in sides):
            raise RefusedPickleError(f"an array has the invalid shape {shape!r}")
        size = math.prod(sides) * dtype.value.itemsize
        if not isinstance(content, bytes) or len(content) != size:
            raise RefusedPickleError(f"the content of an array of shape {sides} does not have {size:,} bytes")
        self._reserve(size)
        return np.frombuffer(content, dtype.value).reshape(sides, order=order).copy(order=order)

    def _scalar(self, dtype: Any, content: Any) -> Any:
        return self.array(content, dtype, (), "C")[()]

    def _encoded(self, text: Any, encoding: Any) -> bytes:
        """Protocols 0 to 2 write bytes as encoded text."""
        if not isinstance(text, str) or encoding != "latin1":
            raise RefusedPickleError(f"it encodes {type(text).__name__} as {encoding!r}, expected text as 'latin1'")
        self._reserve(len(text))
        return text.encode("latin1")

    def _reserve(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise RefusedPickleError(f"its arrays have more than {self._max_bytes:,} bytes in total")


def _blank_array(kind: Any, *_: Any) -> np.ndarray:
    """An array without elements, whose state is set later."""
    if kind is not ARRAY_CLASS:
        raise RefusedPickleError("it creates an array of a class other than numpy.ndarray")
    return np.zeros(0, np.int8)


def _no_bytes() -> bytes:
    """Protocols 0 to 2 write empty bytes so. There is no argument, which could request bytes of any length."""
    return b""
