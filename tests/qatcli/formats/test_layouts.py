"""Every layout against the golden vectors, and packers against the independent readers over random tensors.

The golden vectors were made by a third packer that was compared with GPTQModel, BitBLAS, compressed-tensors, AWQ and
gguf.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatcli.formats import gguf_readback, readback
from qatcli.formats.layouts import awq, bitblas, bitstream, compressed_tensors, gguf_blocks, gptq, mlx

GOLDEN = Path(__file__).parent / "golden" / "layouts.npz"
BITS = (2, 3, 4, 8)


def _cases() -> dict[str, dict[str, np.ndarray]]:
    cases: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    with np.load(GOLDEN) as file:
        for key in file.files:
            case, name = key.split("/", 1)
            cases[case][name] = file[key]
    return cases


CASES = _cases()
ENTRIES = [
    (case, layout)
    for case, arrays in CASES.items()
    for layout in sorted({n.rsplit("/", 1)[0] for n in arrays if "/" in n})
]


def _triple(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    arrays = CASES[case]
    return arrays["codes"], arrays["zeros"], arrays["scales"], int(re.match(r"b(\d)", case)[1])


def _packed(layout: str, case: str) -> dict[str, np.ndarray]:
    codes, zero, scale, bits = _triple(case)
    if layout == "gptq_v2":
        return gptq.pack_linear(codes, zero, scale, bits=bits)
    if layout == "bitblas":
        return bitblas.pack_linear(codes, zero, scale, bits=bits)
    if layout == "compressed_tensors":
        return compressed_tensors.pack_linear(codes, zero, scale, bits=bits)
    if layout == "awq":
        return awq.pack_linear(codes, zero, scale)
    if layout == "gguf":
        names = [n.split("/")[1] for n in CASES[case] if n.startswith("gguf/")]
        return {name: gguf_blocks.TYPES[name].encode(codes, zero, scale) for name in names}
    assert layout == "gguf_q2_0"
    return {"blocks": gguf_blocks.q2_0(codes, CASES[case]["gguf_q2_0/zeros"], scale)}


def test_golden_file_is_complete() -> None:
    assert len(CASES) == 6
    assert {layout for _, layout in ENTRIES} == {
        "gptq_v2", "bitblas", "compressed_tensors", "awq", "efficientqat", "gguf", "gguf_q2_0",
    }  # fmt: skip


@pytest.mark.parametrize(("case", "layout"), [e for e in ENTRIES if e[1] != "efficientqat"])  # which is only read
def test_packed_arrays_equal_golden(case: str, layout: str) -> None:
    packed = _packed(layout, case)
    compared = 0
    for name, expected in CASES[case].items():
        if name.startswith(layout + "/") and name != "gguf_q2_0/zeros":
            actual = packed[name.split("/", 1)[1]]
            assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
            assert np.array_equal(actual, expected), name
            compared += 1
    assert compared >= 1


@pytest.mark.parametrize(("case", "layout"), [e for e in ENTRIES if not e[1].startswith("gguf")])
def test_readers_recover_golden(case: str, layout: str) -> None:
    codes, zero, scale, bits = _triple(case)
    arrays = {n.split("/", 1)[1]: a for n, a in CASES[case].items() if n.startswith(layout + "/")}
    if layout == "efficientqat":
        triple = readback.efficientqat_3bit(
            arrays["qweight"], arrays["qzeros"], np.ascontiguousarray(scale.T), in_features=codes.shape[1]
        )
    else:
        triple = _read(layout, arrays, bits, codes.shape[1])
    assert np.array_equal(triple.codes, codes)
    assert np.array_equal(triple.zero_point, zero)
    assert np.array_equal(triple.scale, scale)


@pytest.mark.parametrize(("case", "layout"), [e for e in ENTRIES if e[1].startswith("gguf")])
def test_gguf_reader_recovers_golden(case: str, layout: str) -> None:
    codes, zero, scale, _ = _triple(case)
    if layout == "gguf_q2_0":
        zero, blocks = CASES[case]["gguf_q2_0/zeros"], {"Q2_0": CASES[case]["gguf_q2_0/blocks"]}
    else:
        blocks = {n.split("/")[1]: a for n, a in CASES[case].items() if n.startswith("gguf/")}
    for name, rows in blocks.items():
        _assert_blocks(name, rows, codes, zero, scale)
    assert blocks


def _read(layout: str, arrays: dict[str, np.ndarray], bits: int, in_features: int) -> readback.Triple:
    if layout == "gptq_v2":
        return readback.gptq(arrays["qweight"], arrays["qzeros"], arrays["scales"], bits=bits)
    if layout == "bitblas":
        width = 4 if bits == 3 else bits
        return readback.bitblas(arrays["qweight"], arrays["qzeros"], arrays["scales"], bits=width)
    if layout == "awq":
        return readback.awq(arrays["qweight"], arrays["qzeros"], arrays["scales"])
    if layout == "mlx":
        return readback.mlx(arrays["weight"], arrays["scales"], arrays["biases"], bits=bits)
    return readback.pack_quantized(
        arrays["weight_packed"], arrays["weight_zero_point"], arrays["weight_scale"], bits=bits, in_features=in_features
    )


def _assert_blocks(name: str, rows: np.ndarray, codes: np.ndarray, zero: np.ndarray, scale: np.ndarray) -> None:
    decoded = gguf_readback.decode(name, rows)
    columns = codes.shape[1]
    spread = lambda a: np.repeat(a.astype(np.float32), columns // a.shape[1], axis=1)  # noqa: E731
    expected = (codes.astype(np.float32) - spread(zero)) * spread(scale)
    value = decoded.levels * spread(decoded.scale)
    if decoded.offset is not None:
        value = value + spread(decoded.offset)
    tolerance = np.abs(spread(scale) * spread(zero)) * 2.0**-11 if name == "Q4_1" else 0.0
    assert np.all(np.abs(value - expected) <= tolerance), name


@st.composite
def _linears(draw: st.DrawFn, bits: tuple[int, ...] = BITS, groups: tuple[int, ...] = (32, 64, 96)):
    """A random linear; zero points and codes reach both ends of the range often."""
    b = draw(st.sampled_from(bits))
    group = draw(st.sampled_from(groups))
    rows, columns = 32 * draw(st.integers(1, 2)), group * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    high = 1 << b
    codes = rng.integers(0, high, (rows, columns)).astype(np.uint8)
    zero = rng.choice([0, high // 2, high - 1, *rng.integers(0, high, 3)], (rows, columns // group)).astype(np.uint8)
    scale = rng.uniform(1e-4, 0.1, zero.shape).astype(np.float16)
    return codes, zero, scale, b


@given(_linears())
@settings(max_examples=40, deadline=None)
def test_every_layout_round_trips(linear) -> None:
    codes, zero, scale, bits = linear
    packed = {
        "gptq_v2": gptq.pack_linear(codes, zero, scale, bits=bits),
        "bitblas": bitblas.pack_linear(codes, zero, scale, bits=bits),
        "compressed_tensors": compressed_tensors.pack_linear(codes, zero, scale, bits=bits),
    }
    if codes.shape[1] % 32 == 0:
        packed["mlx"] = mlx.pack_linear(codes, zero, scale, bits=bits)
    if bits <= 4:
        packed["awq"] = awq.pack_linear(codes, zero, scale)
    for layout, arrays in packed.items():
        triple = _read(layout, arrays, bits, codes.shape[1])
        assert np.array_equal(triple.codes, codes), layout
        assert np.array_equal(triple.zero_point, zero), layout
        assert np.array_equal(triple.scale, scale), layout


@given(_linears(bits=(2, 3, 4), groups=(32, 64, 256, 512)))
@settings(max_examples=40, deadline=None)
def test_every_gguf_type_that_accepts_a_linear_carries_it(linear) -> None:
    codes, zero, scale, bits = linear
    accepted = []
    for name, block in gguf_blocks.TYPES.items():
        try:
            rows = block.encode(codes, zero, scale)
        except ValueError:
            continue
        assert rows.shape == (len(codes), codes.shape[1] // block.length * block.bytes)
        _assert_blocks(name, rows, codes, zero, scale)
        accepted.append(name)
    assert gguf_blocks.choose_type(codes, zero, bits=bits) in accepted
    assert gguf_blocks.choose_type(codes, zero, bits=bits, exact=True) in accepted


@given(st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8)), st.integers(1, 100), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_bitstream_matches_a_big_integer(bits: int, length: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (1, length)).astype(np.uint8)
    number = sum(int(v) << (i * bits) for i, v in enumerate(values[0]))
    words = bitstream.pack(values, bits)
    assert words.tobytes() == number.to_bytes(words.size * 4, "little")
    assert np.array_equal(readback.stream(words, bits, length), values)


def test_v1_stores_minus_one_and_refuses_asymmetric() -> None:
    codes = np.zeros((32, 64), np.uint8)
    scale = np.ones((32, 1), np.float16)
    for bits in BITS:
        middle = np.full((32, 1), 1 << (bits - 1), np.uint8)
        arrays = gptq.pack_linear(codes, middle, scale, bits=bits, version=1)
        stored = readback.stream(arrays["qzeros"], bits, 32)
        assert np.all(stored == (1 << (bits - 1)) - 1)
        triple = readback.gptq(arrays["qweight"], arrays["qzeros"], arrays["scales"], bits=bits, stored_minus_one=True)
        assert np.array_equal(triple.zero_point, middle)
        with pytest.raises(ValueError, match="version 1"):
            gptq.pack_linear(codes, middle - 1, scale, bits=bits, version=1)


def test_code_out_of_range_is_refused_instead_of_spilling() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        bitstream.pack(np.array([[1, 4]], np.uint8), 2)
