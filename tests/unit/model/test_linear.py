"""Products with weights of every kind, and shards that keep theirs in eight bits."""

from __future__ import annotations

import pytest
import torch

from blyan_node.model import linear
from blyan_node.model.linear import FEW_ROWS, Linear
from blyan_node.model.quantize import quantize_to_fp8, quantize_to_int8
from blyan_node.model.shard import Work
from tests.unit.model.conftest import Imported
from tests.unit.model.walk import Pipeline

BOTH = pytest.mark.parametrize("to_eight_bits", [quantize_to_int8, quantize_to_fp8])
COMPUTE = pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])


@BOTH
@COMPUTE
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_an_eight_bit_product_is_that_of_the_dequantised_weight(
    to_eight_bits: object, compute: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.Generator().manual_seed(1)
    dense = [torch.randn(out, 96, generator=source) * 0.1 for out in (64, 24)]
    biases = [torch.randn(len(weight), generator=source).to(compute) for weight in dense]
    quantized = [to_eight_bits(weight) for weight in dense]  # type: ignore[operator]
    x = torch.randn(rows, 96, generator=source).to(compute)
    monkeypatch.setattr("blyan_node.model.quantize._BLOCK", 96 * 10)  # several tiles, the last one short
    got = torch.cat(Linear(quantized, biases).split(x), dim=-1)
    exact = torch.cat(
        [
            x.double() @ weight.dequantize().double().T + bias.double()
            for weight, bias in zip(quantized, biases, strict=True)
        ],
        dim=-1,
    )
    assert got.dtype == compute
    tolerance = 1e-5 if compute == torch.float32 else 3 * 2.0**-8
    torch.testing.assert_close(got.double(), exact, atol=tolerance, rtol=tolerance)


@BOTH
def test_a_row_does_not_depend_on_the_others_of_its_batch(to_eight_bits: object) -> None:
    """What torch's dynamic quantisation gets wrong: one loud row takes the precision of all others."""
    source = torch.Generator().manual_seed(2)
    product = Linear([to_eight_bits(torch.randn(64, 64, generator=source))])  # type: ignore[operator]
    quiet, loud = torch.randn(8, 64, generator=source), 1e4 * torch.randn(8, 64, generator=source)
    apart, together = product(quiet), product(torch.cat([quiet, loud]))[:8]
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)


def test_int8_stays_in_eight_bits_and_fp8_is_expanded_on_a_cpu(tiny: Imported) -> None:
    seen = {dtype: tiny.shard(0, 1, dtype=dtype)._embedding for dtype in ("int8", "fp8", "float32")}
    assert seen["int8"] is not None
    assert seen["int8"].dtype == torch.int8
    assert seen["fp8"] is not None
    assert seen["fp8"].dtype in (torch.bfloat16, torch.float32)
    assert isinstance(seen["float32"], torch.Tensor)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.03), ("int8", 0.06), ("fp8", 0.25)])
def test_a_shard_in_another_precision_stays_near_float32(tiny: Imported, dtype: str, most: float) -> None:
    """Relative error of the logits of a random model; what it costs a real one is measured by benchmarks/quality.py."""
    ids = torch.randint(0, 1000, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = Pipeline([tiny.shard()]).logits(ids)
    parts = [tiny.shard(0, 2, dtype=dtype), tiny.shard(3, dtype=dtype)]
    got = Pipeline(parts).logits(ids).float()
    assert 0 < (got - expected).norm() / expected.norm() < most
    whole = tiny.shard(dtype=dtype)
    assert torch.equal(Pipeline([whole]).logits(ids).float(), got)
    # One by one, where int8 has a kernel of its own, as many at once.
    session = Pipeline([whole])
    single = torch.cat([session.logits([token]) for token in ids[:8]]).float()
    assert (single - got[:8]).norm() / got[:8].norm() < most


def test_a_shard_in_eight_bits_draws_the_same_token_in_any_batch_of_its_kind(tiny: Imported) -> None:
    shard = tiny.shard(dtype="int8")
    caches = [shard.open(bytes([index]), 64) for index in range(8)]
    logits = shard.logits([Work(cache, 0, tuple(range(20))) for cache in caches])
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert linear.FEW_ROWS < 20
