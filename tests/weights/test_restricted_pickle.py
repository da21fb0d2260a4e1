"""`read_pickle` restores plain data of every protocol and refuses everything else without running it."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boxwright.weights import restricted_pickle
from boxwright.weights.restricted_pickle import RefusedPickleError, read_pickle

PROTOCOLS = range(6)
SHARED = np.arange(6, dtype=np.float32).reshape(2, 3)
PLAIN = {
    "list": [1, -5, 255, 65535, 2**40, -(2**70), True, False, None],
    "numbers": (1.5, -0.0, 1e300, 10**20),
    "text": ["", "plain", "späß \n 'quoted' \\ ☃", "x" * 300],
    "bytes": [b"", b"\x00\xff\n", b"y" * 300],
    ("a", 1): {"deep": [[[]], {}, ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))]},
    "arrays": [
        SHARED,
        SHARED,
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.arange(3, dtype=">i2"),
        np.zeros((0, 5), np.float32),
        np.array(True),
        np.arange(4, dtype=np.uint8)[::2],
    ],
    "scalars": [np.float32(0.1), np.int64(-3), np.bool_(True)],
}


def write(folder: Path, data: bytes) -> Path:
    path = folder / "file.pkl"
    path.write_bytes(data)
    return path


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        np.testing.assert_array_equal(actual, expected)
        assert actual.flags.writeable
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, two in zip(actual, expected, strict=True):
            assert_same(one, two)
    else:
        assert actual == expected


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_is_restored(protocol: int, old_names: bool, tmp_path: Path) -> None:
    data = pickle.dumps(PLAIN, protocol)
    expected = pickle.loads(data)
    if old_names:  # module names of numpy < 2; protocols 4 and 5 store the length before the name
        for module in (b"multiarray", b"numeric"):
            old, new = b"numpy.core." + module, b"numpy._core." + module
            data = data.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(new, old)
    actual = read_pickle(write(tmp_path, data))
    assert_same(actual, expected)
    assert actual["arrays"][0] is actual["arrays"][1]


def test_python_2_pickles_are_read(tmp_path: Path) -> None:
    """Bytes as written by Python 2's cPickle (protocols 0 and 2), where text and array contents are `str`."""
    content = np.array([[1.5, -2.0]], np.float32).tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nI2\ntcnumpy\ndtype\n"
    array += b"(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
    old = b"(dS'boxes'\n(l" + array + b"S" + repr(content)[1:].encode() + b"\ntbas."
    newer = b"\x80\x02}U\x05boxes](" + array + b"U" + bytes([len(content)]) + content + b"tbes."
    for data in (old, newer):
        actual = read_pickle(write(tmp_path, data))
        assert list(actual) == ["boxes"]
        np.testing.assert_array_equal(actual["boxes"][0], np.array([[1.5, -2.0]], np.float32))
    assert read_pickle(write(tmp_path, b"U\x01\xe9.")) == "é"


class Reduces:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


class Plain:
    """An instance of a user-defined class."""


def hostile(folder: Path) -> dict[str, bytes]:
    """Pickles that would create the file `hit`, or return something other than data, if they were run."""
    command = f"touch {folder / 'hit'}"
    line = command.encode()
    string = struct.pack("<I", len(line)) + line
    pickles = {
        "global and reduce": b"cos\nsystem\n(S'" + line + b"'\ntR.",
        "global of posix": b"\x80\x02cposix\nsystem\nX" + string + b"\x85R.",
        "inst": b"(S'" + line + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nX" + string + b"o.",
        "build of a global": b"cos\nsystem\n}(S'x'\nI1\nub.",
        "build of a name": b"cnumpy\nndarray\n}X\x01\x00\x00\x00xK\x01sb.",
        "build with a slot state": b"](N}X\x01\x00\x00\x00xK\x01stb.",
        "persistent id": b"P" + line + b"\n.",
        "binary persistent id": b"X" + string + b"Q.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93X" + string + b"\x85R.",
        "stack global from memory": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940hK0\x93.",
        "dotted stack global": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        "newobj": b"\x80\x02cbuiltins\nobject\n)\x81.",
        "newobj of an array": b"\x80\x02cnumpy\nndarray\nK\x05\x85\x81.",
        "newobj_ex": b"\x80\x04cnumpy\nndarray\n)}\x92.",
        "extension": b"\x80\x02\x82\x01.",
        "eval": b"c__builtin__\neval\n(S'1'\ntR.",
        "getattr": b"cbuiltins\ngetattr\n.",
        "numpy's load": b"cnumpy\nload\n.",
        "numpy's f2py": b"cnumpy.testing._private.utils\nrunstring\n.",
        "a codec that is none": b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        "bytes of any length": b"c__builtin__\nbytes\n(I1000000000000\ntR.",
        "decode": b"c_codecs\ndecode\n.",
        "buffer from outside": b"\x80\x05\x97.",
        "a name as data": b"cnumpy\ndtype\n.",
        "a mark as data": b"(.",
        "a hidden name": b"(lcnumpy\nndarray\na.",
    }
    for protocol in PROTOCOLS:
        pickles[f"os.system {protocol}"] = pickle.dumps(Reduces(os.system, command), protocol)
        pickles[f"hidden in a list {protocol}"] = pickle.dumps([1, {"a": (Reduces(os.system, command),)}], protocol)
        pickles[f"exec {protocol}"] = pickle.dumps(Reduces(exec, f"import os; os.system({command!r})"), protocol)
        pickles[f"object array {protocol}"] = pickle.dumps(np.array([None, "x"], dtype=object), protocol)
        pickles[f"structured array {protocol}"] = pickle.dumps(np.zeros(2, dtype=[("a", "f4")]), protocol)
        pickles[f"array of text {protocol}"] = pickle.dumps(np.array(["x"]), protocol)
        pickles[f"own class {protocol}"] = pickle.dumps(Plain(), protocol)
        pickles[f"ordered dict {protocol}"] = pickle.dumps(OrderedDict(a=1), protocol)
        pickles[f"set {protocol}"] = pickle.dumps({1, 2}, protocol)
    return pickles


HOSTILE = list(hostile(Path("x")))


@pytest.mark.parametrize("name", HOSTILE)
def test_everything_but_data_is_refused_without_effect(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, hostile(tmp_path)[name])
    with pytest.raises(RefusedPickleError, match=r"file\.pkl is (refused|not a valid pickle)"):
        read_pickle(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file.pkl"]


def test_hostile_pickles_have_an_effect_when_loaded_with_pickle(tmp_path: Path) -> None:
    for name in ("global and reduce", "inst", "obj", "stack global", "os.system 0", "os.system 5"):
        pickle.loads(hostile(tmp_path)[name])
        (tmp_path / "hit").unlink()


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n%b"
ARRAY += b"tcnumpy\ndtype\n(S'f4'\ntRI00\n%btb."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"(l",
        b"\x80\x06N.",
        b"a.",
        b"h\x05.",
        b"(K\x01d.",
        b"}(]K\x01u.",
        b"NN.",
        b"\x8e" + b"\xff" * 8 + b"x.",
        b"\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 5000 + b"\n.",
        ARRAY % (b"(I4\n", b"C\x04abcd"),
        ARRAY % (b"(I-1\n", b"C\x04abcd"),
        ARRAY % (b"(I1000000000\nI1000000000\n", b"C\x04abcd"),
        ARRAY % (b"(S'x'\n", b"C\x04abcd"),
    ],
    ids=range(15),
)
def test_damaged_pickles_are_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(RefusedPickleError, match=r"file\.pkl is"):
        read_pickle(write(tmp_path, data))


def test_an_array_of_the_declared_size_is_read(tmp_path: Path) -> None:
    np.testing.assert_array_equal(
        read_pickle(write(tmp_path, ARRAY % (b"(I1\n", b"C\x04" + np.float32(2).tobytes()))), np.float32([2])
    )


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_pickle, "MAX_INSTRUCTIONS", 50)
    with pytest.raises(RefusedPickleError, match="more than 50 instructions"):
        read_pickle(write(tmp_path, b"]" * 60))
    # Encoding one text repeatedly must not fill the memory.
    monkeypatch.setattr(restricted_pickle, "MAX_BYTES", 2000)
    again = (
        b"(c_codecs\nencode\n(S'" + b"x" * 900 + b"'\np0\nS'latin1'\ntR" + b"c_codecs\nencode\n(g0\nS'latin1'\ntR" * 3
    )
    with pytest.raises(RefusedPickleError, match="more than 2,000 bytes"):
        read_pickle(write(tmp_path, again + b"t."))
    with pytest.raises(RefusedPickleError, match="more than the limit of 2,000"):
        read_pickle(write(tmp_path, b"x" * 3000))


def test_a_list_that_contains_itself_is_read(tmp_path: Path) -> None:
    circle: list[Any] = []
    circle.append(circle)
    actual = read_pickle(write(tmp_path, pickle.dumps(circle)))
    assert actual[0] is actual
