from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.chain.money import NANO, parse_bly, show_bly
from blyan_node.chain.records import MAX_MONEY
from blyan_node.errors import RequestError


@given(st.one_of(st.integers(0, MAX_MONEY), st.integers(0, 10**6), st.integers(0, 10**9).map(lambda n: n * NANO)))
def test_an_amount_reads_back_as_it_was_printed(amount):
    text = show_bly(amount)
    assert parse_bly(text) == amount
    assert Decimal(text) == Decimal(amount) / NANO
    assert "." not in text or not text.endswith(("0", "."))


@given(st.integers(0, 10**9), st.integers(0, 10**9 - 1), st.integers(1, 9), st.integers(0, 5))
def test_decimals_are_read_exactly(whole, nano, digits, zeros):
    decimals = f"{nano:09}"[:digits] + "0" * zeros
    text = f"{whole}.{decimals}"
    if (exact := Decimal(text) * NANO) <= MAX_MONEY:
        assert parse_bly(text) == exact


@pytest.mark.parametrize(
    ("text", "amount"),
    [("0", 0), ("1", NANO), ("007", 7 * NANO), ("1.50", 3 * NANO // 2), ("0.000000001", 1), ("1000000000", MAX_MONEY)],
)
def test_amounts(text, amount):
    assert parse_bly(text) == amount


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not an amount"),
        (".5", "not an amount"),
        ("5.", "not an amount"),
        ("-1", "not an amount"),
        ("+1", "not an amount"),
        ("1e3", "not an amount"),
        ("1,000", "not an amount"),
        ("1_000", "not an amount"),
        (" 1", "not an amount"),
        ("1\n", "not an amount"),
        ("nan", "not an amount"),
        ("inf", "not an amount"),
        ("0x10", "not an amount"),
        ("١", "not an amount"),
        ("1" * 5000, "not an amount"),
        ("0.0000000001", "finer"),
        ("1000000000.000000001", "more than there can be"),
    ],
)
def test_what_is_no_amount(text, reason):
    with pytest.raises(RequestError, match=reason):
        parse_bly(text)


def test_there_are_no_negative_amounts():
    with pytest.raises(ValueError):
        show_bly(-1)
