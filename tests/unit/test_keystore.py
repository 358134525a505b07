from __future__ import annotations

import copy
import json
import stat

import pytest

from blyan_node.chain.keys import Key
from blyan_node.chain.keystore import (
    SCRYPT_N,
    decrypt_key,
    encrypt_key,
    load_keystore,
    save_keystore,
)
from blyan_node.errors import ConfigError, LocalError, RequestError

PASSWORD = "correct horse"
KEY = Key(b"\7" * 32)
FAST = 8192
SAVED = encrypt_key(KEY, PASSWORD, n=FAST)
# The two examples of the Web3 Secret Storage Definition, version 3; both hold this secret.
SECRET = "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d"
WITH_PBKDF2 = {
    "crypto": {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": "6087dab2f9fdbbfaddc31a909735c1e6"},
        "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
        "kdf": "pbkdf2",
        "kdfparams": {
            "c": 262144,
            "dklen": 32,
            "prf": "hmac-sha256",
            "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
        },
        "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
    },
    "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
    "version": 3,
}
WITH_SCRYPT = {
    "crypto": {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": "83dbcc02d8ccb40e466191a123791e0e"},
        "ciphertext": "d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c",
        "kdf": "scrypt",
        "kdfparams": {
            "dklen": 32,
            "n": 262144,
            "r": 1,
            "p": 8,
            "salt": "ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19",
        },
        "mac": "2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097",
    },
    "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
    "version": 3,
}


@pytest.mark.parametrize("keystore", [WITH_PBKDF2, WITH_SCRYPT], ids=["pbkdf2", "scrypt"])
def test_the_published_examples_open(keystore):
    assert decrypt_key(keystore, "testpassword").secret.hex() == SECRET


def test_files_of_other_wallets_with_other_habits_open():
    """Capital Crypto (old Geth), 0x before hex, an address with 0x."""
    other = {"Crypto": SAVED["crypto"], "version": 3, "address": "0x" + KEY.address.hex().upper()}
    other = copy.deepcopy(other)
    other["Crypto"]["mac"] = "0x" + other["Crypto"]["mac"]
    assert decrypt_key(other, PASSWORD).secret == KEY.secret


def test_a_wallet_written_is_read_back(tmp_path):
    path = tmp_path / "keys" / "wallet.json"
    save_keystore(path, SAVED)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["wallet.json"]
    assert decrypt_key(load_keystore(path), PASSWORD).secret == KEY.secret
    assert KEY.secret.hex() not in path.read_text()
    assert json.loads(path.read_text())["address"] == KEY.address.hex()


def test_two_wallets_of_one_key_share_no_randomness():
    other = encrypt_key(KEY, PASSWORD, n=FAST)
    for name in ["ciphertext", "mac"]:
        assert other["crypto"][name] != SAVED["crypto"][name]
    assert other["id"] != SAVED["id"]


def test_users_get_the_full_cost():
    assert SCRYPT_N == 2**18
    assert encrypt_key.__kwdefaults__ == {"n": SCRYPT_N}


def test_one_password_typed_in_two_ways_is_one():
    composed, decomposed = "m\u00fcnchen-1", "mu\u0308nchen-1"
    assert decrypt_key(encrypt_key(KEY, composed, n=FAST), decomposed).secret == KEY.secret


@pytest.mark.parametrize("password", ["", "correct horsf", "Correct horse", "correct horse "])
def test_a_wrong_password_is_told(password):
    with pytest.raises(RequestError, match="wrong password"):
        decrypt_key(SAVED, password)


def test_passwords_have_a_least_length():
    with pytest.raises(RequestError, match="at least 8"):
        encrypt_key(KEY, "1234567", n=FAST)
    assert encrypt_key(KEY, "12345678", n=2)


def changed(*path, value=None, drop=False):
    keystore = copy.deepcopy(SAVED)
    table = keystore
    for name in path[:-1]:
        table = table[name]
    if drop:
        del table[path[-1]]
    else:
        table[path[-1]] = value
    return keystore


@pytest.mark.parametrize(
    ("keystore", "reason"),
    [
        (None, "no table"),
        ([], "no table"),
        ({}, "version"),
        (changed("version", value=1), "another version"),
        (changed("version", value="3"), "version"),
        (changed("version", value=True), "version"),
        (changed("crypto", drop=True), "Crypto"),
        (changed("crypto", "cipher", value="aes-128-cbc"), "aes-128-cbc"),
        (changed("crypto", "cipherparams", "iv", value="00"), "iv has 1 bytes"),
        (changed("crypto", "cipherparams", value=7), "cipherparams"),
        (changed("crypto", "ciphertext", value="xy"), "ciphertext is not hex"),
        (changed("crypto", "ciphertext", value=SAVED["crypto"]["ciphertext"][2:]), "ciphertext has 31 bytes"),
        (changed("crypto", "mac", drop=True), "mac is missing"),
        (changed("crypto", "kdf", value="argon2"), "argon2"),
        (changed("crypto", "kdf", value="pbkdf2"), "c is missing"),
        (changed("crypto", "kdfparams", "dklen", value=16), "dklen"),
        (changed("crypto", "kdfparams", "n", value=2**21), "far too much"),
        (changed("crypto", "kdfparams", "n", value=1000), "not valid"),
        (changed("crypto", "kdfparams", "n", value=-2), "not valid"),
        (changed("crypto", "kdfparams", "r", value=0), "not valid"),
        (changed("crypto", "kdfparams", "r", value=2**11), "far too much"),
        (changed("crypto", "kdfparams", "p", value=0), "not valid"),
        (changed("crypto", "kdfparams", "p", value=2**9), "far too much"),
        (changed("crypto", "kdfparams", "salt", value=5), "salt"),
        (changed("address", value="00" * 20), "another address"),
    ],
)
def test_a_damaged_keystore_is_told_and_harms_nobody(keystore, reason):
    with pytest.raises(ConfigError, match=reason):
        decrypt_key(keystore, PASSWORD)


@pytest.mark.parametrize(("name", "value"), [("c", 10**8), ("c", 0), ("prf", "hmac-md5")])
def test_pbkdf2_is_bounded_too(name, value):
    keystore = copy.deepcopy(WITH_PBKDF2)
    keystore["crypto"]["kdfparams"][name] = value
    with pytest.raises(ConfigError, match="PBKDF2"):
        decrypt_key(keystore, PASSWORD)


def test_every_flipped_bit_of_what_is_encrypted_is_noticed():
    for bit in range(0, 256, 32):
        flipped = bytearray.fromhex(SAVED["crypto"]["ciphertext"])
        flipped[bit // 8] ^= 1
        with pytest.raises(RequestError, match="damaged"):
            decrypt_key(changed("crypto", "ciphertext", value=flipped.hex()), PASSWORD)


def test_a_wallet_is_never_overwritten(tmp_path):
    path = tmp_path / "wallet.json"
    save_keystore(path, SAVED)
    before = path.read_bytes()
    with pytest.raises(LocalError, match="already"):
        save_keystore(path, encrypt_key(Key(b"\x08" * 32), PASSWORD, n=2))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_wallet_that_others_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "wallet.json"
    save_keystore(path, SAVED)
    path.chmod(mode)
    with pytest.raises(LocalError, match="chmod 600"):
        load_keystore(path)
    path.chmod(0o400)
    assert load_keystore(path) == SAVED


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 60_000, b" " * 70_000])
def test_a_file_that_is_no_wallet(tmp_path, content):
    path = tmp_path / "wallet.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="wallet"):
        load_keystore(path)


def test_no_wallet_and_no_place_for_one(tmp_path):
    with pytest.raises(LocalError, match="no wallet in"):
        load_keystore(tmp_path / "none.json")
    with pytest.raises(LocalError, match="cannot read"):
        load_keystore(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match="cannot write"):
        save_keystore(tmp_path / "file" / "wallet.json", SAVED)
