"""Messages: what goes in comes out, what is no message is refused, and nothing in one is ever executed."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_runtime import serving
from flashrt_runtime.serving import wire
from flashrt_runtime.serving.refusals import Refusal

DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
          "float16", "float32", "float64", ">f4")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_arrays_and_scalars_come_back(dtype, shape):
    array = np.array(np.arange(int(np.prod(shape))).reshape(shape) % 2, dtype)
    back = wire.unpack(wire.pack({"array": array, "list": [array]}))
    for found in (back["array"], back["list"][0]):
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
    if not shape:
        assert wire.unpack(wire.pack(array[()])) == array[()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_openpis_client_and_we_write_the_same_bytes(dtype):
    client = pytest.importorskip("openpi_client.msgpack_numpy")
    content = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.float32(1.5), "c": [1, "two", None]}
    assert wire.pack(content) == client.packb(content)


@pytest.mark.parametrize("value", [object(), np.array([object()]), np.array(["text"]), np.void(b"x"), 1j])
def test_other_things_are_not_sent(value):
    with pytest.raises(TypeError, match="cannot be sent"):
        wire.pack({"value": value})


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
marks = st.sampled_from([b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"])
dtypes = st.sampled_from(["<f4", "O", "|V8", "<f4,<f4", "U4", "f4" * 50, "<M8[s]", "", "<f16", "c8"])
messages = st.recursive(
    plain | dtypes,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(marks | st.text(max_size=4), inner | dtypes),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(messages.map(msgpack.packb) | st.binary(max_size=200))
def test_whatever_comes_is_data_or_refused(content):
    with contextlib.suppress(Refusal):
        wire.unpack(content)


def test_the_server_has_no_pickle():
    """Nor what runs text: every import and call of the package, read from its sources."""
    forbidden = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    for file in Path(serving.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "__import__"}, file
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                raise AssertionError(file)
            assert not forbidden & set(names), file
