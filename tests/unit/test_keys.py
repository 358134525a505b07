from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.chain import keys
from blyan_node.chain.keys import (
    GROUP_ORDER,
    Key,
    address_of,
    digest,
    load_or_create_key,
    parse_address,
    recover,
    show_address,
    unused_mark,
)
from blyan_node.errors import ConfigError, LocalError, RuleError, SignatureError

# EIP-55, "Test Cases"
EIP_55 = [
    "0x52908400098527886E0F7030069857D2E4169EE7",
    "0x8617E340B3D01FA5F11F306F4090FD50E238070D",
    "0xde709f2102306220921060314715629080e2fb77",
    "0x27b1fdb04752bbc536007a920d24acb045561c26",
    "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
    "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
    "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
    "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
]
KEY = Key(bytes.fromhex("4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318"))
HASH = digest(b"test", b"message")


def test_address_is_ethereums():
    # the account of web3.js's documentation (web3.eth.accounts.privateKeyToAccount)
    assert show_address(KEY.address) == "0x2c7536E3605D9C16a7a3D7b1898e529396a65c23"
    assert address_of(KEY.public) == KEY.address


@pytest.mark.parametrize("text", EIP_55)
def test_eip_55(text):
    assert show_address(parse_address(text)) == text
    assert parse_address(text.lower()) == parse_address("0x" + text[2:].upper()) == parse_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0x",
        "5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
        "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAe",
        "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAeg",
        "0x5AAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
        "0X5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
    ],
)
def test_a_mistyped_address_is_refused(text):
    with pytest.raises(RuleError):
        parse_address(text)


def test_a_good_signature_is_recovered_once_and_a_bad_one_each_time(monkeypatch):
    calls = []
    monkeypatch.setattr(keys, "recover", lambda *args: calls.append(args) or recover(*args))
    signature = KEY.sign(digest(b"once", b"message"))
    for _ in range(3):
        assert keys.recover_address(digest(b"once", b"message"), signature) == KEY.address
    assert len(calls) == 1
    for _ in range(2):
        with pytest.raises(SignatureError):
            keys.recover_address(digest(b"once", b"message"), bytes(65))
    assert len(calls) == 3


def test_signatures_recover_and_are_deterministic():
    signature = KEY.sign(HASH)
    assert len(signature) == 65
    assert recover(HASH, signature) == KEY.public
    assert KEY.sign(HASH) == signature


@given(st.binary(min_size=65, max_size=65))
def test_random_signatures_recover_another_key_or_raise(signature):
    try:
        assert recover(HASH, signature) != KEY.public
    except SignatureError:
        pass


@given(st.integers(0, 65 * 8 - 1))
def test_a_flipped_bit_never_recovers_the_key(bit):
    signature = bytearray(KEY.sign(HASH))
    signature[bit // 8] ^= 1 << bit % 8
    try:
        assert recover(HASH, bytes(signature)) != KEY.public
    except SignatureError:
        pass


def test_the_high_s_is_refused():
    signature = KEY.sign(HASH)
    s = GROUP_ORDER - int.from_bytes(signature[32:64])
    twin = signature[:32] + s.to_bytes(32) + bytes([signature[64] ^ 1])  # as valid, by the mathematics
    with pytest.raises(SignatureError, match="low"):
        recover(HASH, twin)


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(65), bytes(66), b"\1" * 64 + b"\4"])
def test_impossible_signatures_are_refused(signature):
    with pytest.raises(SignatureError):
        recover(HASH, signature)


def test_domains_separate():
    assert len({digest(b"a", b"bc"), digest(b"ab", b"c"), digest(b"", b"abc"), digest(b"abc", b"")}) == 4
    assert digest(b"blyan/test/1", b"payload").hex() == (
        "d45f2000733f4ac6d51eccbcf9c1a6d4dbdf1d5d52725c3a463468b10235e58b"
    )


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), bytes(32), GROUP_ORDER.to_bytes(32)])
def test_what_is_no_secret_is_refused(secret):
    with pytest.raises(ConfigError):
        Key(secret)


def test_a_key_does_not_show_its_secret():
    assert KEY.secret.hex() not in repr(KEY) + str(KEY)


def test_a_key_file_is_made_once_and_private(tmp_path: Path):
    path = tmp_path / "deep" / "key"
    key = load_or_create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == key.secret.hex() + "\n"
    assert load_or_create_key(path).address == key.address
    assert sorted(each.name for each in path.parent.iterdir()) == ["key", "key.unused"]
    unused_mark(path).unlink()
    load_or_create_key(path)
    assert not unused_mark(path).exists(), "only a new key is unused"


def test_a_key_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "key"
    load_or_create_key(path)
    path.chmod(0o640)
    with pytest.raises(LocalError, match=f"chmod 600 {path}"):
        load_or_create_key(path)


@pytest.mark.parametrize("text", ["", "zz", "00" * 32, "11" * 31, "11" * 400])
def test_a_key_file_without_a_key_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(LocalError, match="64 hex digits"):
        load_or_create_key(path)
    assert path.read_text() == text


def test_a_key_file_that_is_binary_or_no_file_is_refused(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"\xff\xfe" * 32)
    path.chmod(0o600)
    with pytest.raises(LocalError, match="64 hex digits"):
        load_or_create_key(path)
    directory = tmp_path / "directory"
    directory.mkdir()
    with pytest.raises(LocalError, match="cannot read"):
        load_or_create_key(directory)


def _load(path: Path) -> bytes:
    return load_or_create_key(path).address


def test_processes_that_start_at_once_share_one_key(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        addresses = pool.map(_load, [tmp_path / "key"] * 16)
    assert len(set(addresses)) == 1
