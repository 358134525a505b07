"""Sign-In with Ethereum, against messages and signatures that other libraries made (vectors/siwe.json tells which)."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from Crypto.Hash import keccak
from hypothesis import example, given
from hypothesis import strategies as st

from blyan_node.api.errors import ApiError
from blyan_node.api.signin import MAX_TOKENS, MAX_USED, NONCE_S, SKEW_S, TOKEN_S, SignIn
from blyan_node.api.siwe import Message, parse, seconds_of, signer_of
from blyan_node.chain.keys import GROUP_ORDER, Key, show_address
from blyan_node.errors import Overloaded, RequestError, SignatureError

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "siwe.json").read_text())
TEXTS = [vector["message"] for vector in VECTORS["signed"]]
KEY = Key(b"\7" * 32)
ADDRESS = show_address(KEY.address)
NOW = 1_800_000_000.0


def personal_sign(text: str, key: Key = KEY) -> str:
    data = b"\x19Ethereum Signed Message:\n%d%s" % (len(text.encode()), text.encode())
    raw = key.sign(keccak.new(digest_bits=256, data=data).digest())
    return "0x" + raw[:64].hex() + bytes([raw[64] + 27]).hex()


@pytest.mark.parametrize("vector", VECTORS["signed"], ids=lambda vector: f"{vector['by']} {vector['name']}")
def test_messages_of_other_libraries(vector):
    message = parse(vector["message"])
    assert message.render() == vector["message"]
    assert message.address == vector["address"] == ADDRESS
    assert show_address(signer_of(vector["message"], vector["signature"])) == ADDRESS
    assert personal_sign(vector["message"]) == vector["signature"]


@pytest.mark.parametrize("vector", VECTORS["parsed"], ids=lambda vector: vector["what"])
def test_edited_messages_are_judged_as_the_other_library_does(vector):
    if vector["accepted"]:
        assert parse(vector["message"]).render() == vector["message"]
    else:
        with pytest.raises(RequestError):
            parse(vector["message"])


def test_every_field_is_read():
    message = parse(next(v["message"] for v in VECTORS["signed"] if v["name"] == "everything"))
    assert (message.domain, message.uri, message.chain_id) == ("node.example", "https://node.example", 1)
    assert message.statement == "All of it: 1, 2; (3)!"
    assert seconds_of(message.expires) - seconds_of(message.issued_at) == 600
    assert (message.request_id, len(message.resources)) == ("some-id", 2)


@given(st.text(max_size=300) | st.sampled_from(TEXTS).flatmap(lambda text: st.builds(_spliced, *_pieces(text))))
@example("\n" * 5000)
@example("a" * 5000)
def test_whatever_comes_is_refused_or_means_exactly_what_it_says(text):
    try:
        message = parse(text)
    except RequestError:
        return
    assert message.render() == text


def _pieces(text):
    return st.just(text), st.integers(0, len(text)), st.integers(0, 6), st.text(max_size=6)


def _spliced(text, at, length, more):
    return text[:at] + more + text[at + length :]


def words(alphabet, least=1):
    return st.text(alphabet, min_size=least, max_size=12)


TIMES = st.datetimes(min_value=datetime(1971, 1, 1), timezones=st.just(UTC)).map(datetime.isoformat)  # noqa: DTZ001
URIS = words("abc:/?#[]@!$&'()*+,;=%~-._01", 0).map(lambda rest: f"https:{rest}")
MESSAGES = st.builds(
    Message,
    domain=words("abc.-:[]01@"),
    address=st.binary(min_size=20, max_size=20).map(show_address),
    uri=URIS,
    chain_id=st.integers(0, 10**18 - 1),
    nonce=words("abcXYZ019", 8),
    issued_at=TIMES,
    scheme=st.none() | st.sampled_from(["http", "https", "a+b-c."]),
    statement=st.none() | words("abc :/?#[]@!$&'()*+,;=._~-"),
    expires=st.none() | TIMES,
    not_before=st.none() | TIMES,
    request_id=st.none() | words("abc%:-/", 0),
    resources=st.none() | st.lists(URIS, max_size=3).map(tuple),
)


@given(MESSAGES)
def test_what_is_written_is_read_back(message):
    assert parse(message.render()) == message


@given(st.binary(max_size=70).map(bytes.hex) | st.text(max_size=140), st.text(max_size=20))
def test_signatures_that_are_garbage(signature, text):
    try:
        assert len(signer_of(text, signature)) == 20
    except SignatureError:
        pass


def test_signatures_have_one_form():
    text = TEXTS[0]
    signature = VECTORS["signed"][0]["signature"]
    r, s, v = signature[2:66], int(signature[66:130], 16), int(signature[130:], 16)
    assert signer_of(text, f"{r}{s:064x}{v - 27:02x}") == KEY.address  # a hardware wallet
    for wrong in (f"{r}{GROUP_ORDER - s:064x}{55 - v:02x}", f"{r}{s:064x}1d", f"{r}{s:064x}", f"{r}{s:064x}{v:02x}00"):
        with pytest.raises(SignatureError):
            signer_of(text, wrong)


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


def asked(door: SignIn, **changes) -> str:
    message = Message(
        domain="node.example",
        address=ADDRESS,
        uri="https://node.example",
        chain_id=1,
        nonce=door.nonce(),
        issued_at=_at(door.clock()),
    )
    return replace(message, **changes).render()


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


@pytest.fixture
def door() -> SignIn:
    return SignIn("https://node.example", 1, clock=Clock())


def test_a_wallet_signs_in_once_per_nonce(door):
    text = asked(door)
    token, address = door.redeem(text, personal_sign(text))
    assert (address, door.find(token), door.find(token + "x")) == (ADDRESS, ADDRESS, None)
    with pytest.raises(ApiError, match="nonce") as again:
        door.redeem(text, personal_sign(text))
    assert again.value.status == 401
    door.clock.now += TOKEN_S
    assert door.find(token) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"domain": "evil.example"}, "is for evil.example"),
        ({"scheme": "http"}, "is for"),
        ({"uri": "https://node.example.evil"}, "URI"),
        ({"uri": "http://node.example"}, "URI"),
        ({"chain_id": 5}, "chain 5"),
        ({"nonce": "0123456789abcdef"}, "nonce"),
        ({"issued_at": _at(NOW - NONCE_S - 1)}, "not now"),
        ({"issued_at": _at(NOW + SKEW_S + 1)}, "not now"),
        ({"expires": _at(NOW)}, "expired"),
        ({"not_before": _at(NOW + SKEW_S + 1)}, "not valid before"),
        ({"address": show_address(b"\1" * 20)}, "not signed by"),
    ],
)
def test_what_is_not_for_here_and_now(door, changes, said):
    text = asked(door, **changes)
    with pytest.raises(ApiError, match=said) as refused:
        door.redeem(text, personal_sign(text))
    assert refused.value.status == 401
    good = asked(door)
    with pytest.raises(ApiError) as forged:
        door.redeem(good, personal_sign(text))  # a signature over another message
    assert forged.value.status == 401
    assert door.redeem(good, personal_sign(good))  # and the nonce is not spent by that


def test_what_is_fine(door):
    for changes in (
        {"scheme": "https"},
        {"uri": "https://node.example/"},
        {"uri": "https://node.example/login?x=1"},
        {"expires": _at(NOW + 1), "not_before": _at(NOW - 1)},
        {"statement": "Chat.", "resources": ("https://node.example/terms",)},
    ):
        text = asked(door, **changes)
        assert door.redeem(text, personal_sign(text))


def test_a_nonce_ends(door):
    text = asked(door, issued_at=_at(NOW + NONCE_S))
    door.clock.now += NONCE_S
    with pytest.raises(ApiError, match="nonce"):
        door.redeem(text, personal_sign(text))
    other = SignIn("https://node.example", 1, clock=door.clock)
    text = asked(other)
    with pytest.raises(ApiError, match="nonce"):
        door.redeem(text, personal_sign(text))


def test_only_those_who_may(door):
    text = asked(door)
    door.allowed = frozenset({show_address(b"\1" * 20)})
    with pytest.raises(ApiError) as refused:
        door.redeem(text, personal_sign(text))
    assert refused.value.status == 403
    door.allowed = frozenset({ADDRESS})
    assert door.redeem(text, personal_sign(text))


def test_what_is_remembered_is_bounded(door):
    for number in range(MAX_TOKENS):
        door._tokens[str(number)] = ("0x", NOW)
    text = asked(door)
    token, _ = door.redeem(text, personal_sign(text))
    assert (len(door._tokens), door.find(token)) == (MAX_TOKENS, ADDRESS)
    door._used.update((str(number), NOW + 1 + number) for number in range(MAX_USED - len(door._used)))
    text = asked(door)
    with pytest.raises(Overloaded):
        door.redeem(text, personal_sign(text))
    door.clock.now += NONCE_S
    text = asked(door)
    assert door.redeem(text, personal_sign(text))
