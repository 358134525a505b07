"""Amounts of BLY as people write them, and the integers that everything else uses. Parsed once, at the edge."""

from __future__ import annotations

import re

from blyan_node.chain.records import MAX_MONEY
from blyan_node.errors import RequestError

DECIMALS = 9
NANO = 1_000_000_000
"""Nano-BLY in one BLY."""

_AMOUNT = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))?", re.ASCII)


def parse_bly(text: str) -> int:
    """Return the nano-BLY of a decimal like ``12`` or ``0.000000001``.

    Raises RequestError for anything else (signs, exponents, grouping), for more than nine decimals other than zeros,
    and for more money than there can be. Zero is an amount; whether it may be paid is not decided here.
    """
    if (match := _AMOUNT.fullmatch(text)) is None:
        raise RequestError(f"{text!r} is not an amount of BLY: write digits, with a point for decimals, like 1.5")
    whole, decimals = match[1], (match[2] or "").rstrip("0")
    if len(decimals) > DECIMALS:
        raise RequestError(f"{text} BLY is finer than the smallest amount, 0.000000001")
    amount = int(whole) * NANO + int(decimals.ljust(DECIMALS, "0"))
    if amount > MAX_MONEY:
        raise RequestError(f"{text} BLY is more than there can be, {MAX_MONEY // NANO}")
    return amount


def show_bly(amount: int) -> str:
    """Return nano-BLY as a decimal without needless zeros, such that :func:`parse_bly` gives it back.

    Raises ValueError for a negative amount: there is none.
    """
    if amount < 0:
        raise ValueError(f"{amount} is no amount of money")
    whole, nano = divmod(amount, NANO)
    return f"{whole}.{nano:09}".rstrip("0").rstrip(".")
