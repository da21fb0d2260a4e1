"""Reads pickles that hold nothing but numpy arrays, numbers, text and plain containers; whatever else is refused.

A pickle is a program for a small stack machine, and Python's own machine calls whatever function the program names.
This one knows the few instructions that data needs, of protocols 0 to 5, and the few names that numpy writes, each of
which stands for a function here. Nothing is imported or looked up, so that no file can do more than be refused.

Text of Python 2, which tells no bytes from letters, comes as `str` of the letters 0..255 (`encoding="latin1"`).
"""

from __future__ import annotations

import codecs
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 8 * 2**30
"""Of a file, and of all arrays in it together."""
MAX_INSTRUCTIONS = 20_000_000
"""Of a file; a list of COCO's 118,000 training images takes two million. Each may make an object of some 60 bytes."""
MAX_DIGITS = 1000
"""Of one whole number, in bytes or decimal digits."""

_PLAIN_TYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c(?:8|16))")
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")


class RefusedPickleError(ValueError):
    """A pickle that is damaged, too large, or holds more than plain data."""


def read_pickle(path: Path) -> Any:
    """Read a pickle file of plain data.

    Args:
        path: Of the file.

    Returns:
        Arrays of numbers and bools, their scalars, int, float, complex, bool, None, str, bytes, list, tuple and dict.

    Raises:
        RefusedPickleError: It is none; nothing of it took effect.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise RefusedPickleError(f"{path} is refused: {size:,} bytes are over the limit of {MAX_BYTES:,}")
    try:
        if not size:
            raise EOFError
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Machine(data).run()
    except RefusedPickleError as error:
        raise RefusedPickleError(f"{path} is refused: {error}") from None
    except EOFError:
        raise RefusedPickleError(f"{path} is cut short: copy or fetch it again") from None
    # Whatever a damaged or crafted program makes of the stack, its numbers and its text.
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise RefusedPickleError(f"{path} is no sound pickle: {error!r}") from None


class _Name:
    """What a program may name: a call of ours, or the class that numpy's calls mention."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call


class _Dtype:
    """An array's type while the program still makes it."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _PLAIN_TYPE.fullmatch(code):
            raise RefusedPickleError(f"it holds an array of type {code!r}, not of numbers")
        self.value = np.dtype(code)

    def set_state(self, state: Any) -> None:
        """Take the byte order, which is all that a plain type's state says."""
        _, order, *rest = state
        order = order.decode() if isinstance(order, bytes) else order
        if order not in ("<", ">", "=", "|") or rest[:3] != [None, None, None] or len(rest) > 7:
            raise RefusedPickleError(f"it holds an array with a type of parts, {state!r}")
        self.value = np.dtype(order + self.value.str[1:])


_ARRAY_CLASS = _Name()
_MARK = object()


class _Machine:
    """Runs one program."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.room = MAX_BYTES
        self.names: dict[tuple[str, str], _Name] = {
            ("numpy", "ndarray"): _ARRAY_CLASS,
            ("numpy", "dtype"): _Name(_Dtype),
            ("_codecs", "encode"): _Name(self._encoded),
            ("__builtin__", "bytes"): _Name(_no_bytes),
        }
        for module in _MULTIARRAY:
            self.names[module, "_reconstruct"] = _Name(_blank_array)
            self.names[module, "scalar"] = _Name(self._scalar)
        for module in _NUMERIC:
            self.names[module, "_frombuffer"] = _Name(self._array)

    def run(self) -> Any:
        """What the program leaves on its stack."""
        for _ in range(MAX_INSTRUCTIONS):
            code = self._take(1)
            if code == b".":
                (result,) = self.stack
                self._require_plain(result)
                return result
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                what = _REFUSED.get(code, "is unknown")
                raise RefusedPickleError(f"byte {self.position - 1}: instruction {code!r} {what}")
            instruction(self)
        raise RefusedPickleError(f"it has over {MAX_INSTRUCTIONS:,} instructions")

    # What arrays are made of.

    def _array(self, content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """An array of its own memory, from bytes that fit its shape exactly."""
        if not isinstance(dtype, _Dtype) or order not in ("C", "F"):
            raise RefusedPickleError("it holds an array without a type")
        if isinstance(content, str):  # of Python 2
            content = content.encode("latin1")
        sides = shape if isinstance(shape, tuple) else (shape,)
        if len(sides) > 32 or not all(type(side) is int and side >= 0 for side in sides):
            raise RefusedPickleError(f"it holds an array of shape {shape!r}")
        size = math.prod(sides) * dtype.value.itemsize
        if not isinstance(content, bytes) or len(content) != size:
            raise RefusedPickleError(f"it holds an array of shape {sides} with another number of bytes than {size}")
        self._reserve(size)
        return np.frombuffer(content, dtype.value).reshape(sides, order=order).copy(order=order)

    def _scalar(self, dtype: Any, content: Any) -> Any:
        return self._array(content, dtype, (), "C")[()]

    def _encoded(self, text: Any, encoding: Any) -> bytes:
        """How protocols 0 to 2 write bytes."""
        if not isinstance(text, str) or encoding != "latin1":
            raise RefusedPickleError(f"it encodes {type(text).__name__} as {encoding!r}")
        self._reserve(len(text))
        return text.encode("latin1")

    def _reserve(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise RefusedPickleError(f"its arrays hold over {MAX_BYTES:,} bytes")

    def _require_plain(self, value: Any) -> None:
        """Check that no half-made thing is left in the result; containers are visited once each."""
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            thing = waiting.pop()
            if isinstance(thing, (list, tuple, dict)):
                if id(thing) not in seen:
                    seen.add(id(thing))
                    waiting.extend(thing.values() if isinstance(thing, dict) else thing)
                    waiting.extend(thing.keys() if isinstance(thing, dict) else ())
            elif thing is _MARK or isinstance(thing, (_Name, _Dtype)):
                raise RefusedPickleError("it holds a type or a function, where only data may be")

    # Reading.

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise EOFError
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise EOFError
        line = self._take(end - self.position)
        self.position += 1
        return line

    def _counted(self, form: str) -> bytes:
        return self._take(self._number(form))

    def _decimal(self) -> int:
        line = self._line()
        if len(line) > MAX_DIGITS:
            raise RefusedPickleError(f"it holds a number of {len(line)} digits")
        return int(line.rstrip(b"L"))

    def _whole(self, size: int) -> int:
        if not 0 <= size <= MAX_DIGITS:
            raise RefusedPickleError(f"it holds a number of {size} bytes")
        return int.from_bytes(self._take(size), "little", signed=True)

    # The stack.

    def _above_mark(self) -> list[Any]:
        """Everything above the last mark, taken off with it."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise RefusedPickleError("a mark is missing")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise RefusedPickleError("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise RefusedPickleError("it appends to what is no list")
        self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise RefusedPickleError("it sets items of what is no dict")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _decimal_or_bool(self) -> int | bool:
        start = self.position
        line = self._line()
        if line in (b"00", b"01"):
            return line == b"01"
        self.position = start
        return self._decimal()

    def _quoted(self) -> str:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise RefusedPickleError("it holds text without quotes")
        return codecs.escape_decode(line[1:-1])[0].decode("latin1")

    def _name(self, module: Any, name: Any) -> _Name:
        known = self.names.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            raise RefusedPickleError(
                f"it names {module}.{name}, which is no data and may be a program: only numpy arrays, numbers, text "
                "and plain containers are read"
            )
        return known

    def _global(self) -> _Name:
        module, name = self._line().decode(), self._line().decode()
        return self._name(module, name)

    def _call(self) -> Any:
        function, arguments = self._last(2)
        if not isinstance(function, _Name) or function.call is None or not isinstance(arguments, tuple):
            raise RefusedPickleError("it calls what is no function")
        return function.call(*arguments)

    def _build(self) -> None:
        """Give what is on the stack its state: only arrays and their types take one."""
        (state,) = self._last(1)
        target = self.stack[-1]
        if isinstance(target, _Dtype):
            target.set_state(state)
        elif isinstance(target, np.ndarray):
            _, shape, dtype, by_columns, content = state
            array = self._array(content, dtype, shape, "F" if by_columns else "C")
            # In place, because the program may have remembered it: all of the state was checked above.
            checked: Any = (1, array.shape, array.dtype, bool(by_columns), array.tobytes(order="A"))
            target.__setstate__(checked)
        else:
            raise RefusedPickleError(f"it sets the state of a {type(target).__name__}")

    def _remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def _recall(self, number: int) -> Any:
        return self.memo[number]


def _blank_array(kind: Any, *_: Any) -> np.ndarray:
    """An array without elements, which gets its state later."""
    if kind is not _ARRAY_CLASS:
        raise RefusedPickleError("it makes an array of another class than numpy's")
    return np.zeros(0, np.int8)


def _no_bytes() -> bytes:
    """How protocols 0 to 2 write empty bytes; with an argument it would make some of any length."""
    return b""


def _pushes(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return instruction


def _protocol(machine: _Machine) -> None:
    protocol = machine._number("<B")
    if protocol > 5:
        raise RefusedPickleError(f"it is of protocol {protocol}; 0 to 5 are read")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    # Frames and marks
    b"\x80": _protocol,
    b"\x95": lambda m: m._take(8),
    b"(": _pushes(lambda m: _MARK),
    b"0": lambda m: m._last(1),
    b"1": lambda m: m._above_mark(),
    # Numbers
    b"N": _pushes(lambda m: None),
    b"\x88": _pushes(lambda m: True),
    b"\x89": _pushes(lambda m: False),
    b"I": _pushes(lambda m: m._decimal_or_bool()),
    b"L": _pushes(lambda m: m._decimal()),
    b"J": _pushes(lambda m: m._number("<i")),
    b"K": _pushes(lambda m: m._number("<B")),
    b"M": _pushes(lambda m: m._number("<H")),
    b"\x8a": _pushes(lambda m: m._whole(m._number("<B"))),
    b"\x8b": _pushes(lambda m: m._whole(m._number("<i"))),
    b"F": _pushes(lambda m: float(m._line())),
    b"G": _pushes(lambda m: m._number(">d")),
    # Text and bytes
    b"S": _pushes(lambda m: m._quoted()),
    b"T": _pushes(lambda m: m._take(max(m._number("<i"), 0)).decode("latin1")),
    b"U": _pushes(lambda m: m._counted("<B").decode("latin1")),
    b"V": _pushes(lambda m: m._line().decode("raw-unicode-escape")),
    b"X": _pushes(lambda m: _text(m._counted("<I"))),
    b"\x8c": _pushes(lambda m: _text(m._counted("<B"))),
    b"\x8d": _pushes(lambda m: _text(m._counted("<Q"))),
    b"B": _pushes(lambda m: m._counted("<I")),
    b"C": _pushes(lambda m: m._counted("<B")),
    b"\x8e": _pushes(lambda m: m._counted("<Q")),
    b"\x96": _pushes(lambda m: m._counted("<Q")),
    # Containers
    b")": _pushes(lambda m: ()),
    b"t": _pushes(lambda m: tuple(m._above_mark())),
    b"\x85": _pushes(lambda m: tuple(m._last(1))),
    b"\x86": _pushes(lambda m: tuple(m._last(2))),
    b"\x87": _pushes(lambda m: tuple(m._last(3))),
    b"]": _pushes(lambda m: []),
    b"l": _pushes(lambda m: m._above_mark()),
    b"a": lambda m: m._extend(m._last(1)),
    b"e": lambda m: m._extend(m._above_mark()),
    b"}": _pushes(lambda m: {}),
    b"d": lambda m: _dict(m),
    b"s": lambda m: m._update(m._last(2)),
    b"u": lambda m: m._update(m._above_mark()),
    # Memory
    b"p": lambda m: m._remember(m._decimal()),
    b"q": lambda m: m._remember(m._number("<B")),
    b"r": lambda m: m._remember(m._number("<I")),
    b"\x94": lambda m: m._remember(len(m.memo)),
    b"g": _pushes(lambda m: m._recall(m._decimal())),
    b"h": _pushes(lambda m: m._recall(m._number("<B"))),
    b"j": _pushes(lambda m: m._recall(m._number("<I"))),
    # Names, which are looked up in the machine's own table, and calls of what stands there
    b"c": _pushes(lambda m: m._global()),
    b"\x93": _pushes(lambda m: m._name(*m._last(2))),
    b"R": _pushes(lambda m: m._call()),
    b"b": lambda m: m._build(),
}
_REFUSED = {
    b"i": "makes an object of a class",
    b"o": "makes an object of a class",
    b"\x81": "makes an object of a class",
    b"\x92": "makes an object of a class",
    b"P": "asks for an object from outside",
    b"Q": "asks for an object from outside",
    b"\x82": "asks for a registered object",
    b"\x83": "asks for a registered object",
    b"\x84": "asks for a registered object",
    b"\x97": "asks for memory from outside",
    b"\x98": "asks for memory from outside",
}
"""Instructions that plain data never needs, with what they would do."""


def _dict(machine: _Machine) -> None:
    items = machine._above_mark()
    machine.stack.append({})
    machine._update(items)
