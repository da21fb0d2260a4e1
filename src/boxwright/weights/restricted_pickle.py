"""Reads pickles of numpy arrays, numbers, text and plain containers, and refuses all others.

A pickle is a program for a small stack machine. Python's own machine calls any function that the program names. This
machine knows only the few instructions that data needs, of protocols 0 to 5, and only the few names that numpy writes
(`pickle_names`). Nothing is imported or looked up, so the worst that a file can do is to be refused.

Python 2 text, which does not distinguish bytes from letters, is read as `str` of the letters 0..255
(`encoding="latin1"`).
"""

from __future__ import annotations

import codecs
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from boxwright.weights.pickle_names import Dtype, Name, Names, RefusedPickleError

MAX_BYTES = 8 * 2**30
"""Limit on the size of a file, and on all arrays in it together."""
MAX_INSTRUCTIONS = 20_000_000
"""Limit on instructions per file. A list of COCO's 118,000 training images takes two million; one instruction may make
an object of about 60 bytes."""
MAX_DIGITS = 1000
"""Limit on one whole number, in bytes or decimal digits."""


def read_pickle(path: Path) -> Any:
    """Read a pickle file of plain data.

    Args:
        path: The pickle file.

    Returns:
        Arrays of numbers and bools, their scalars, int, float, complex, bool, None, str, bytes, list, tuple and dict.

    Raises:
        RefusedPickleError: The file is damaged, too large, or holds more than plain data. Nothing in it was executed.
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise RefusedPickleError(f"{path}: the file has {size:,} bytes, more than the limit of {MAX_BYTES:,}")
    try:
        if not size:
            raise EOFError
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Machine(data).run()
    except RefusedPickleError as error:
        raise RefusedPickleError(f"{path} is refused, because it is not a pickle of plain data: {error}") from None
    except EOFError:
        raise RefusedPickleError(f"{path} is truncated. Copy or download it again") from None
    # Errors that a damaged or crafted program causes with its stack, its numbers and its text.
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise RefusedPickleError(f"{path} is not a valid pickle ({error!r}). Copy or download it again") from None


_MARK = object()


class _Machine:
    """Runs one program."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names = Names(MAX_BYTES)

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
        raise RefusedPickleError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")

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
            elif thing is _MARK or isinstance(thing, (Name, Dtype)):
                raise RefusedPickleError("it contains a type or a function as data")

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
            raise RefusedPickleError(f"a number has {len(line):,} digits, more than the limit of {MAX_DIGITS:,}")
        return int(line.rstrip(b"L"))

    def _whole(self, size: int) -> int:
        if not 0 <= size <= MAX_DIGITS:
            raise RefusedPickleError(f"a number has {size:,} bytes, expected 0 to {MAX_DIGITS:,}")
        return int.from_bytes(self._take(size), "little", signed=True)

    # The stack.

    def _above_mark(self) -> list[Any]:
        """Everything above the last mark, taken off with it."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise RefusedPickleError("the pickle is damaged (a mark is missing). Copy or download the file again")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise RefusedPickleError(
                "the pickle is damaged (too few values on its stack). Copy or download the file again"
            )
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise RefusedPickleError("it appends to a value that is not a list")
        self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise RefusedPickleError("it sets items of a value that is not a dict")
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
            raise RefusedPickleError("a text has no quotes")
        return codecs.escape_decode(line[1:-1])[0].decode("latin1")

    def _global(self) -> Name:
        module, name = self._line().decode(), self._line().decode()
        return self.names.look_up(module, name)

    def _call(self) -> Any:
        function, arguments = self._last(2)
        if not isinstance(function, Name) or function.call is None or not isinstance(arguments, tuple):
            raise RefusedPickleError("it calls a value that is not a function")
        return function.call(*arguments)

    def _build(self) -> None:
        """Give what is on the stack its state: only arrays and their types take one."""
        (state,) = self._last(1)
        target = self.stack[-1]
        if isinstance(target, Dtype):
            target.set_state(state)
        elif isinstance(target, np.ndarray):
            _, shape, dtype, by_columns, content = state
            array = self.names.array(content, dtype, shape, "F" if by_columns else "C")
            # In place, because the program may have remembered it: all of the state was checked above.
            checked: Any = (1, array.shape, array.dtype, bool(by_columns), array.tobytes(order="A"))
            target.__setstate__(checked)
        else:
            raise RefusedPickleError(f"it sets the state of an object of type {type(target).__name__}")

    def _remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def _recall(self, number: int) -> Any:
        return self.memo[number]


def _pushes(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return instruction


def _protocol(machine: _Machine) -> None:
    protocol = machine._number("<B")
    if protocol > 5:
        raise RefusedPickleError(f"its pickle protocol is {protocol}; supported are 0 to 5")


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
    b"\x93": _pushes(lambda m: m.names.look_up(*m._last(2))),
    b"R": _pushes(lambda m: m._call()),
    b"b": lambda m: m._build(),
}
_REFUSED = {
    b"i": "creates an object of a class",
    b"o": "creates an object of a class",
    b"\x81": "creates an object of a class",
    b"\x92": "creates an object of a class",
    b"P": "requests an external object",
    b"Q": "requests an external object",
    b"\x82": "requests a registered object",
    b"\x83": "requests a registered object",
    b"\x84": "requests a registered object",
    b"\x97": "requests an external buffer",
    b"\x98": "requests an external buffer",
}
"""Instructions that plain data never needs, with what they would do."""


def _dict(machine: _Machine) -> None:
    items = machine._above_mark()
    machine.stack.append({})
    machine._update(items)
