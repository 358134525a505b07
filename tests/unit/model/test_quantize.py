from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from blyan_node.model import quantize
from blyan_node.model.quantize import Quantized, quantize_to_fp8, quantize_to_int8

LARGEST = 2.0**127
BOTH = pytest.mark.parametrize("to_eight_bits", [quantize_to_int8, quantize_to_fp8])

shapes = arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)
anything = arrays.arrays(np.float32, shapes, elements=st.floats(-LARGEST, LARGEST, width=32))
# Rows whose sizes have nothing to do with each other, and one outlier that takes the scale of its row.
trained = st.builds(
    lambda seed, sizes, outlier: np.float32(
        np.random.default_rng(seed).standard_normal((len(sizes), 64)) * np.exp2(sizes)[:, None]
        + np.pad([[outlier]], ((0, len(sizes) - 1), (0, 63)))
    ),
    st.integers(0, 1 << 32),
    st.lists(st.integers(-149, 100), min_size=1, max_size=4),
    st.floats(-(2.0**100), 2.0**100),
)
weights = st.one_of(anything, trained).map(torch.from_numpy)
awkward = torch.tensor(
    [
        [0.0, -0.0, 0.0],
        [LARGEST, -LARGEST, 1.0],
        [2.0**-149, -(2.0**-126), 0.0],
        [2.0**-149, -(2.0**-149), 0.0],
        [1e9, 1e-9, -1e-9],
    ]
)


@settings(deadline=None)
@given(weights)
@example(awkward)
def test_int8_is_off_by_half_a_step_at_most(weight: torch.Tensor) -> None:
    quantized = quantize_to_int8(weight)
    exact = weight.double()
    amax = exact.abs().amax(1)
    step = quantized.scales.double()
    torch.testing.assert_close(step, (amax / 127).clamp(min=2.0**-126), rtol=2.0**-22, atol=0)
    error = (quantized.dequantize().double() - exact).abs()
    assert (error <= (step / 2 + amax * 2.0**-22)[:, None]).all()
    assert quantized.values.abs().max() <= 127


@settings(deadline=None)
@given(weights)
@example(awkward)
def test_fp8_is_off_by_a_sixteenth_at_most_and_by_less_where_it_is_small(weight: torch.Tensor) -> None:
    quantized = quantize_to_fp8(weight)
    exact = weight.double()
    scale = quantized.scales.double()[:, None]
    error = (quantized.dequantize().double() - exact).abs()
    normal = exact.abs() >= scale * 2.0**-6
    assert (error[normal] <= exact.abs()[normal] * 2.0**-4).all()
    assert (error <= scale * 2.0**-10)[~normal].all()


@settings(deadline=None)
@given(weights)
@example(awkward)
def test_fp8_scales_are_the_least_powers_of_two_that_hold_a_row(weight: torch.Tensor) -> None:
    quantized = quantize_to_fp8(weight)
    mantissa, exponent = torch.frexp(quantized.scales)
    assert (mantissa == 0.5).all()
    assert quantized.values.float().isfinite().all()
    amax = weight.double().abs().amax(1)
    assert ((amax > 224 * quantized.scales.double()) | (exponent == -116) | (amax == 0)).all()


@settings(deadline=None)
@given(weights)
@example(awkward)
def test_a_dequantised_fp8_weight_is_exact_in_bfloat16(weight: torch.Tensor) -> None:
    quantized = quantize_to_fp8(weight)
    assert torch.equal(quantized.dequantize(torch.bfloat16).double(), quantized.dequantize().double())
    assert torch.equal(quantized.dequantize().double(), quantized.values.double() * quantized.scales.double()[:, None])


@BOTH
@settings(deadline=None)
@given(weights)
@example(awkward)
def test_quantising_again_changes_nothing(to_eight_bits: object, weight: torch.Tensor) -> None:
    once = to_eight_bits(weight)  # type: ignore[operator]
    twice = to_eight_bits(once.dequantize())  # type: ignore[operator]
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=1e-6, atol=2.0**-126)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_stored_in_sixteen_bits_is_quantised_as_it_is(to_eight_bits: object, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    of_stored, of_wide = to_eight_bits(weight), to_eight_bits(weight.float())  # type: ignore[operator]
    assert same(of_stored, of_wide)


@BOTH
def test_a_large_weight_in_blocks_equals_its_rows_one_by_one(
    to_eight_bits: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(11, 40, generator=torch.Generator().manual_seed(2))
    whole = to_eight_bits(weight)  # type: ignore[operator]
    dense = whole.dequantize()
    for block in (1, 80, 100):
        monkeypatch.setattr(quantize, "_BLOCK", block)
        assert same(to_eight_bits(weight), whole)  # type: ignore[operator]
        assert torch.equal(whole.dequantize(), dense)


def test_a_quantised_weight_counts_its_bytes() -> None:
    quantized = quantize_to_fp8(torch.randn(256, 512))
    assert quantized.dtype == torch.float8_e4m3fn
    assert quantized.numel() == 256 * 512
    assert quantized.nbytes == 256 * 512 + 256 * 4
    assert quantize_to_int8(torch.randn(256, 512)).dtype == torch.int8


def same(one: Quantized, other: Quantized) -> bool:
    return torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8)) and torch.equal(
        one.scales, other.scales
    )
