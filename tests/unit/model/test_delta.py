from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from blyan_node.codec import decode, encode
from blyan_node.errors import BlyanError, CodecError, RuleError
from blyan_node.model import delta as codec
from blyan_node.model.checkpoint_spec import from_hf_config
from blyan_node.model.delta import apply_delta, compress_delta, compress_units, decompress_delta, decompress_units
from tests.support.models import tiny_config

LARGEST = float(np.finfo(np.float32).max)
LEAST = 2.0**-149
SPEC = from_hf_config(tiny_config(layers=2, hidden=64, vocab=300))

shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
finite = st.floats(-LARGEST, LARGEST, width=32)
trained = st.floats(-0.0625, 0.0625, width=32)
edges = st.sampled_from([0.0, -0.0, LEAST, -LEAST, 1e-4, -1e-4, 0.9999e-4, 6.5465, -6.5469, LARGEST, -LARGEST])
tensors = arrays.arrays(np.float32, shapes, elements=st.one_of(finite, trained, edges.map(np.float32))).map(
    torch.from_numpy
)
bounds = st.one_of(st.just(1e-4), st.floats(1e-30, 1e30))


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, exact: float64 holds every difference of two float32 to 2^-53 of itself."""
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def normal(count: int = 1_000_000, scale: float = 0.01) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(7)) * scale


@settings(deadline=None)
@given(tensors, bounds)
@example(torch.tensor([LEAST, -LEAST, 0.0]), 1e-30)
@example(torch.tensor([LARGEST, -LARGEST, 1e-30]), 1e30)
@example(torch.tensor([6.54, 6.5466, -6.5466, 3.27]), 1e-4)
@example(torch.empty(0, 3), 1e-4)
@example(torch.tensor(1.5), 1e-4)
def test_no_value_is_off_by_more_than_was_asked_for(delta: torch.Tensor, atol: float) -> None:
    back = decompress_delta(compress_delta(delta, atol), tuple(delta.shape))
    assert back.shape == delta.shape
    assert worst(back, delta) <= atol


def test_the_bound_holds_over_the_whole_range_of_the_quantiser() -> None:
    delta = torch.linspace(-7, 7, 3_000_001)  # ±6.546 is where the quantiser ends; float32 is coarse before that
    assert worst(decompress_delta(compress_delta(delta)), delta) <= 1e-4


def test_values_out_of_range_come_back_exactly() -> None:
    delta = torch.tensor([7.0, -7.25, 1e9, LARGEST, -LARGEST, 0.01])
    assert torch.equal(decompress_delta(compress_delta(delta))[:5], delta[:5])


def test_a_normal_delta_is_compressed_fourfold() -> None:
    delta = normal()
    compressed = compress_delta(delta)
    assert delta.nbytes / len(compressed) >= 4
    assert torch.allclose(delta, decompress_delta(compressed), atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, codec._BLOCK + 5])
def test_what_is_not_finite_is_refused(value: float, place: int) -> None:
    delta = torch.zeros(codec._BLOCK + 9)
    delta[place] = value
    with pytest.raises(RuleError, match="NaN"):
        compress_delta(delta)


@pytest.mark.parametrize("atol", [0.0, -1e-4, math.nan, math.inf, 1e-31])
def test_a_bound_that_is_none_is_refused(atol: float) -> None:
    with pytest.raises(RuleError, match="asked for"):
        compress_delta(torch.zeros(3), atol)


def test_other_dtypes_and_larger_tensors_are_refused() -> None:
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(RuleError, match="dtype"):
            compress_delta(torch.zeros(3, dtype=dtype))
    with pytest.raises(RuleError, match="at most"):
        compress_delta(torch.zeros(1).expand(codec.MAX_ELEMENTS + 1))


def test_a_pinned_encoding_means_what_it_always_meant() -> None:
    pinned = "94920203ce3951816701c41928b52ffd201081000064c700ff0201000000ff00000000f040"
    bits = [0x3C23AD18, 0xBCA3AD18, 0, 0x40F00000, 0x39518167, 0xB9518167]
    back = decompress_delta(bytes.fromhex(pinned), (2, 3))
    assert [value & 0xFFFFFFFF for value in back.view(torch.int32).flatten().tolist()] == bits
    again = compress_delta(torch.tensor([[0.01, -0.02, 0.0], [7.5, 1e-4, -1e-4]]))
    assert torch.equal(decompress_delta(again), back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_and_views_are_encoded_as_they_are(dtype: torch.dtype) -> None:
    delta = normal(600).to(dtype).reshape(20, 30).T
    assert worst(decompress_delta(compress_delta(delta), (30, 20)), delta) <= 1e-4


def test_blocks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = normal(1000, scale=3)
    whole = compress_delta(delta)
    monkeypatch.setattr(codec, "_BLOCK", 7)
    assert compress_delta(delta) == whole
    assert torch.equal(decompress_delta(whole), decompress_delta(compress_delta(delta)))


# Bytes of a peer

SHAPE = (3, 40)
HONEST = compress_delta(normal(120, scale=4).reshape(SHAPE))


def lie(**changes: object) -> bytes:
    fields = dict(zip(("shape", "step", "exact", "planes"), decode(HONEST, most=len(HONEST)), strict=True)) | changes
    return encode(list(fields.values()))


def frame(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)  # type: ignore[arg-type]


PLANES = decode(HONEST, most=len(HONEST))[3]
EXACT = decode(HONEST, most=len(HONEST))[2]
CONTENT = zstandard.ZstdDecompressor().decompress(PLANES)
NAN = np.float32(np.nan).tobytes()


def test_the_honest_delta_has_exact_values() -> None:
    assert 0 < EXACT < 120
    assert decompress_delta(lie(), SHAPE).shape == SHAPE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HONEST[:-1],
        HONEST + b"\0",
        lie(shape=[40, 3]),
        lie(shape=[120]),
        lie(shape=[3, 40, 1 << 28]),
        lie(shape=[3, 41]),
        lie(shape=[]),
        lie(step=0),
        lie(step=0x7F800000),
        lie(step=0x7FC00000),
        lie(step=0xB8D1B717),
        lie(step=0x7F000000),
        lie(exact=EXACT - 1),
        lie(exact=EXACT + 1),
        lie(exact=121),
        lie(planes=b""),
        lie(planes=PLANES + b"\0"),
        lie(planes=PLANES + PLANES),
        lie(planes=PLANES[:-1]),
        lie(planes=frame(CONTENT, write_content_size=False)),
        lie(planes=frame(CONTENT + bytes(4))),
        lie(planes=frame(CONTENT[:-4]), exact=EXACT - 1),
        lie(planes=frame(CONTENT + bytes(4)), exact=EXACT + 1),
        lie(planes=frame(CONTENT[:-4] + NAN)),
        lie(planes=frame(bytes(1 << 26))),
    ],
)
def test_a_delta_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(RuleError):
        decompress_delta(data, SHAPE)


def test_without_an_expected_shape_the_size_is_bounded_all_the_same() -> None:
    with pytest.raises(RuleError, match="at most"):
        decompress_delta(lie(shape=[1 << 15, 1 << 15]))


def test_nothing_is_allocated_for_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = bytearray(frame(bytes(1 << 22)))
    assert zstandard.frame_content_size(bytes(bomb)) == 1 << 22
    monkeypatch.setattr(codec.np, "empty", lambda *_: pytest.fail("allocated"))
    with pytest.raises(RuleError, match="size"):
        decompress_delta(lie(planes=bytes(bomb)), SHAPE)


@settings(deadline=None)
@given(st.data())
def test_hostile_bytes_are_decoded_or_refused_and_never_worse(data: st.DataObject) -> None:
    hostile = bytearray(HONEST)
    for _ in range(data.draw(st.integers(1, 4))):
        hostile[data.draw(st.integers(0, len(hostile) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = decompress_delta(bytes(hostile), SHAPE)
    except RuleError:
        return
    assert back.shape == SHAPE
    assert back.isfinite().all()


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    for decoder in (lambda: decompress_delta(data, SHAPE), lambda: decompress_units(data, SPEC, ("layer.0",))):
        with pytest.raises(BlyanError):
            decoder()


# Units

UNITS = ("layer.0", "layer.1")


def unit_deltas(units: tuple[str, ...] = UNITS) -> dict[str, dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(3)
    return {
        unit: {name: torch.randn(shape, generator=source) * 0.01 for name, shape in SPEC.unit_tensors(unit).items()}
        for unit in units
    }


def test_the_deltas_of_units_come_back() -> None:
    deltas = unit_deltas()
    back = decompress_units(compress_units(deltas), SPEC, UNITS)
    assert back.keys() == deltas.keys()
    for unit, tensors in deltas.items():
        assert back[unit].keys() == tensors.keys()
        assert all(worst(back[unit][name], tensor) <= 1e-4 for name, tensor in tensors.items())


def test_a_delta_of_other_units_or_tensors_is_refused() -> None:
    for units in (("layer.0",), ("layer.1",), ("layer.0", "head")):
        with pytest.raises(RuleError):
            decompress_units(compress_units(unit_deltas(units)), SPEC, UNITS)
    deltas = unit_deltas()
    del deltas["layer.1"]["input_layernorm.weight"]
    with pytest.raises(RuleError, match="tensors"):
        decompress_units(compress_units(deltas), SPEC, UNITS)
    other = SPEC.__class__(**{**SPEC.__dict__, "hidden_size": 32})
    with pytest.raises(RuleError):
        decompress_units(compress_units(unit_deltas()), other, UNITS)


def test_more_bytes_than_the_units_could_take_are_not_even_decoded() -> None:
    with pytest.raises(CodecError, match="at most"):
        decompress_units(bytes(1 << 22), SPEC, ("layer.0",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_delta_is_added_in_float32_and_rounded_to_even(dtype: torch.dtype) -> None:
    weight = normal(50_000, scale=1).to(dtype)
    delta = normal(50_000).flip(0)
    applied = apply_delta({"w": weight}, {"w": delta})["w"]
    assert applied.dtype == dtype
    exact = weight.double() + delta.double()
    assert torch.equal(applied, exact.to(torch.float32).to(dtype))


def test_a_delta_that_leads_out_of_range_is_refused() -> None:
    with pytest.raises(RuleError, match="beyond"):
        apply_delta({"w": torch.ones(2, dtype=torch.float16)}, {"w": torch.tensor([0.0, 1e5])})
