"""Phrases and derivation, against published vectors: BIP-39's (the reference implementation's), BIP-32's 1 and 2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemonic import Mnemonic

from blyan_node.chain.keys import show_address
from blyan_node.chain.phrase import HARDENED, LENGTHS, derive, key_of_phrase, new_phrase
from blyan_node.errors import RequestError

ABANDON = "abandon " * 11 + "about"
# BIP-32, test vectors 1 and 2: the secrets along the path, as decoded from the published extended private keys.
SEED_1 = bytes.fromhex("000102030405060708090a0b0c0d0e0f")
SEED_2 = bytes.fromhex(
    "fffcf9f6f3f0edeae7e4e1dedbd8d5d2cfccc9c6c3c0bdbab7b4b1aeaba8a5a2"
    "9f9c999693908d8a8784817e7b7875726f6c696663605d5a5754514e4b484542"
)
BIP32 = [
    (
        SEED_1,
        [HARDENED, 1, 2 + HARDENED, 2, 1_000_000_000],
        [
            "e8f32e723decf4051aefac8e2c93c9c5b214313817cdb01a1494b917c8436b35",
            "edb2e14f9ee77d26dd93b4ecede8d16ed408ce149b6cd80b0715a2d911a0afea",
            "3c6cb8d0f6a264c91ea8b5030fadaa8e538b020f0a387421a12de9319dc93368",
            "cbce0d719ecf7431d88e6a89fa1483e02e35092af60c042b1df2ff59fa424dca",
            "0f479245fb19a38a1954c5c7c0ebab2f9bdfd96a17563ef28a6a4b1a2a764ef4",
            "471b76e389e528d6de6d816857e012c5455051cad6660850e58372a6c3e6e7c8",
        ],
    ),
    (
        SEED_2,
        [0, 2147483647 + HARDENED, 1, 2147483646 + HARDENED, 2],
        [
            "4b03d6fc340455b363f51020ad3ecca4f0850280cf436c70c727923f6db46c3e",
            "abe74a98f6c7eabee0428f53798f0ab8aa1bd37873999041703c742f15ac7e1e",
            "877c779ad9687164e9c2f4f0f4ff0340814392330693ce95a58fe18fd52e6e93",
            "704addf544a06e5ee4bea37098463c23613da32020d604506da8c0518e1da4b7",
            "f1c7c871a54a804afe328b4c83a1c33b8e5ff48f5087273f04efa83b247d6a2d",
            "bb7d39bdb83ecf58f2fd82b6d918341cbef428661ef01ab97c28a4842125ac23",
        ],
    ),
]


@pytest.mark.parametrize(("seed", "path", "secrets"), BIP32)
def test_derivation_follows_bip_32(seed, path, secrets):
    for depth, secret in enumerate(secrets):
        assert derive(seed, tuple(path[:depth])).secret.hex() == secret


def test_the_seed_of_a_phrase_follows_bip_39():
    """First vector of the reference implementation (trezor/python-mnemonic, vectors.json), passphrase TREZOR."""
    assert Mnemonic("english").to_mnemonic(bytes(16)) == ABANDON
    assert Mnemonic("english").to_seed(ABANDON, "TREZOR").hex() == (
        "c55257c360c07c72029aebc1b53c05ed0362ada38ead3e3e9efa3708e5349553"
        "1f09a6987599d18264c1e1c92f2cf141630c7a3c4ab7c81b2f001698e7463b04"
    )


@pytest.mark.parametrize(
    ("phrase", "address"),
    [
        (ABANDON, "0x9858EfFD232B4033E47d90003D41EC34EcaEda94"),  # what MetaMask and Trust Wallet show for it
        ("test " * 11 + "junk", "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"),  # the first account of Hardhat and Anvil
    ],
)
def test_a_phrase_opens_the_address_that_other_wallets_open(phrase, address):
    assert show_address(key_of_phrase(phrase).address) == address


def test_case_and_spaces_do_not_matter_and_the_passphrase_does():
    assert key_of_phrase("  " + ABANDON.upper().replace(" ", "\n ")).address == key_of_phrase(ABANDON).address
    assert key_of_phrase(ABANDON, "TREZOR").address != key_of_phrase(ABANDON).address


def test_a_new_phrase_is_twelve_words_and_differs_each_time():
    one, two = new_phrase(), new_phrase()
    assert len(one.split()) == len(two.split()) == 12
    assert key_of_phrase(one).address != key_of_phrase(two).address


def test_a_phrase_is_as_long_as_asked_for():
    for words in LENGTHS:
        assert len((phrase := new_phrase(words)).split()) == words
        assert key_of_phrase(phrase)
    with pytest.raises(RequestError, match="not 13"):
        new_phrase(13)


@pytest.mark.parametrize(
    ("phrase", "reason"),
    [
        ("", "this one has 0"),
        ("abandon " * 11, "this one has 11"),
        ("abandon " * 13, "this one has 13"),
        ("abandon " * 11 + "abuot", "word 12 of the phrase is not"),
        ("abandon " * 12, "checksum"),
        ("about " + "abandon " * 11, "checksum"),
    ],
)
def test_a_mistyped_phrase_is_named_as_such(phrase, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        key_of_phrase(phrase)
    assert "abuot" not in str(caught.value), "words of a phrase do not belong in errors, which get logged"


@given(st.binary(min_size=16, max_size=64), st.lists(st.integers(0, 2**32 - 1), max_size=4))
def test_every_path_leads_to_a_key_of_its_own(seed, path):
    keys = {derive(seed, tuple(path[:depth])).secret for depth in range(len(path) + 1)}
    assert len(keys) == len(path) + 1
