"""When validators write: for payload, and not for one another's acknowledgements."""

from __future__ import annotations

import pytest

from blyan_node.chain.authoring import Pending, is_acknowledgement, wants_to_write
from blyan_node.chain.records import sign_record
from tests.support.chains import KEYS, NETWORK, Forge

REST = {"records": False, "unacknowledged": False, "content": False, "anchored": False}


@pytest.mark.parametrize(
    ("changes", "writes"),
    [
        ({}, False),
        ({"records": True}, True),
        ({"unacknowledged": True}, True),
        ({"unacknowledged": True, "content": True, "anchored": True}, True),
        ({"content": True}, True),
        ({"content": True, "anchored": True}, False),
        ({"anchored": True}, False),
    ],
)
def test_when_to_write(changes, writes):
    assert wants_to_write(Pending(**{**REST, **changes})) is writes


def test_an_acknowledgement_carries_nothing():
    record = sign_record(KEYS[0], NETWORK, "data", b"", nonce=0)
    assert is_acknowledgement(Forge().block())
    assert not is_acknowledgement(Forge().block(records=(record,)))
