"""Peer ids and addresses: the same as libp2p's, and nothing else accepted."""

import coincurve
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.errors import CodecError, ConfigError
from blyan_node.p2p.address import MOST_CHARACTERS, parse_address, parse_dialable
from blyan_node.p2p.identity import peer_id_of, public_key_of

secrets = st.binary(min_size=32, max_size=32).filter(lambda b: any(b) and b[0] < 0xFF)
ALICE = "16Uiu2HAm" + "x" * 44


@given(secrets)
def test_peer_ids_carry_the_key(secret: bytes) -> None:
    public = coincurve.PublicKey.from_secret(secret).format()
    peer = peer_id_of(public)
    assert peer.startswith("16Uiu2")
    assert public_key_of(peer) == public


def test_peer_ids_are_libp2ps() -> None:
    from libp2p.crypto.secp256k1 import create_new_key_pair
    from libp2p.peer.id import ID

    for number in range(1, 20):
        public = create_new_key_pair(number.to_bytes(32, "big")).public_key
        assert peer_id_of(public.to_bytes()) == str(ID.from_pubkey(public))


@pytest.mark.parametrize("public", [b"", bytes(33), b"\x04" + bytes(32), b"\x02" + bytes(64)])
def test_other_keys_are_refused(public: bytes) -> None:
    with pytest.raises(CodecError):
        peer_id_of(public)


@given(st.text(max_size=80))
def test_any_text_is_a_peer_id_or_refused(text: str) -> None:
    try:
        public = public_key_of(text)
    except CodecError:
        return
    assert peer_id_of(public) == text


@pytest.mark.parametrize("host", ["/ip4/127.0.0.1", "/ip6/::1", "/dns4/node.example.org", "/dns/localhost"])
def test_addresses_round_trip(host: str) -> None:
    peer = peer_id_of(coincurve.PublicKey.from_secret(b"\1" * 32).format())
    text = f"{host}/tcp/4001/p2p/{peer}"
    address, named = parse_dialable(text)
    assert str(address) == text
    assert (address.port, named) == (4001, peer)


@given(st.one_of(st.text(max_size=2 * MOST_CHARACTERS), st.from_regex(r"/(ip4|ip6|dns)/[^/]*/tcp/\d*(/p2p/\w*)?")))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError:
        return
    assert 0 <= address.port <= 65535
    assert parse_address(str(address)) == address


@pytest.mark.parametrize("text", ["/ip4/127.0.0.1/tcp/0/p2p/" + ALICE, "/ip4/127.0.0.1/tcp/4001", "localhost:4001"])
def test_what_cannot_be_dialled_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"address of a peer|names no peer"):
        parse_dialable(text)
