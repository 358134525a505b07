from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.chain.invite import MAX_ADDRESSES, Checkpoint, Invite, parse_invite
from blyan_node.codec import encode
from blyan_node.errors import RequestError

NETWORK = bytes(range(32))
ADDRESS = "/ip4/10.0.0.1/tcp/4001/p2p/16Uiu2HAmVHRgAfPjoP6KGTJqYgQnNd7fk9hrwqCTzhTNxrmBVPUH"
INVITE = Invite.make(NETWORK, "our-net", (ADDRESS,), Checkpoint(12, b"\5" * 32))


def written(*fields: object) -> str:
    """An invite of any content, with a good checksum."""
    packed = encode(list(fields))
    raw = packed + hashlib.sha256(packed).digest()[:4]
    return "blyan1" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@given(
    st.binary(min_size=32, max_size=32),
    st.text(min_size=1, max_size=16),
    st.lists(st.text(min_size=1, max_size=64), min_size=1, max_size=MAX_ADDRESSES).map(tuple),
    st.none() | st.builds(Checkpoint, st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32)),
)
def test_an_invite_survives_being_written(network, name, bootstrap, checkpoint):
    invite = Invite.make(network, name, bootstrap, checkpoint)
    text = str(invite)
    assert text.startswith("blyan1")
    assert text.isascii()
    assert parse_invite(text) == invite


def test_the_form_is_pinned():
    assert str(INVITE) == written(1, NETWORK, b"our-net", [ADDRESS.encode()], [12, b"\5" * 32])


def test_long_lines_are_broken_by_mail_programs():
    text = str(INVITE)
    assert parse_invite(f"  {text[:60]}\r\n {text[60:]}\n") == INVITE


def test_only_so_many_addresses_are_taken():
    many = tuple(f"{ADDRESS}{number}" for number in range(20))
    assert Invite.make(NETWORK, "n", many).bootstrap == many[:8]


@given(st.integers(6, len(str(INVITE)) - 1), st.sampled_from("abcXYZ019-_"))
def test_every_mistyped_letter_is_found(place, letter):
    text = str(INVITE)
    mistyped = text[:place] + letter + text[place + 1 :]
    if mistyped == text:
        return
    with pytest.raises(RequestError, match="mistyped"):
        parse_invite(mistyped)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "begin with blyan1"),
        ("/ip4/10.0.0.1/tcp/4001", "begin with blyan1"),
        ("blyan1", "mistyped or cut off"),
        ("blyan1=", "mistyped or cut off"),
        ("blyan1ä", "mistyped or cut off"),
        (str(INVITE)[:-3], "mistyped or cut off"),
        (str(INVITE) + "A", "mistyped or cut off"),
        (str(INVITE) + "=", "mistyped"),
        (str(INVITE).replace("blyan1", "BLYAN1"), "begin with blyan1"),
        (str(INVITE) + "A" * 100_000, "mistyped or cut off"),
        (written(2, NETWORK, b"n", [b"a"], None), "another version"),
        (written(1, NETWORK, b"n", [b"a"]), "another version"),
        (written(1, NETWORK[:31], b"n", [b"a"], None), "another version"),
        (written(1, NETWORK, b"", [b"a"], None), "another version"),
        (written(1, NETWORK, b"n", [], None), "another version"),
        (written(1, NETWORK, b"n", [b"a"] * 9, None), "another version"),
        (written(1, NETWORK, b"n", [b"a" * 257], None), "another version"),
    ],
)
def test_what_is_no_invite(text, told):
    with pytest.raises(RequestError, match=told):
        parse_invite(text)


@pytest.mark.parametrize("fields", [(NETWORK, "", (ADDRESS,)), (NETWORK, "n", ()), (b"", "n", (ADDRESS,))])
def test_what_cannot_be_made(fields):
    with pytest.raises(RequestError, match="not a usable invite"):
        Invite.make(*fields)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(raw):
    text = "blyan1" + base64.urlsafe_b64encode(raw + hashlib.sha256(raw).digest()[:4]).rstrip(b"=").decode()
    with pytest.raises(RequestError):
        parse_invite(text)
