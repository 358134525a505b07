"""Wallets on this machine: made, taken in, given out. Nothing of this needs a node."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from blyan_node.chain import keystore
from blyan_node.chain.keys import Key, load_or_create_key, show_address
from blyan_node.chain.keystore import decrypt_key, encrypt_key, load_keystore, save_keystore
from blyan_node.chain.phrase import key_of_phrase
from tests.support.commands import Done, environment, invoke

PASSWORD = "correct horse"
ABANDON = "abandon " * 11 + "about"
ABANDON_ADDRESS = "0x9858EfFD232B4033E47d90003D41EC34EcaEda94"  # m/44'/60'/0'/0/0, as every Ethereum wallet shows it
KEY = Key(b"\7" * 32)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    """Passwords are stretched at the full cost for users only."""
    monkeypatch.setitem(keystore.encrypt_key.__kwdefaults__, "n", 2)


def wallet(*arguments: str, data_dir: Path, stdin: str = "", password: str = PASSWORD, **variables: str) -> Done:
    return invoke(
        "wallet", *arguments, data_dir=data_dir, stdin=stdin, **({"BLYAN_WALLET_PASSWORD": password} | variables)
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def kept(data_dir: Path, name: str) -> Key:
    return decrypt_key(load_keystore(data_dir / "wallets" / f"{name}.json"), PASSWORD)


def test_a_new_wallet_comes_with_its_phrase_once(tmp_path):
    root = tmp_path / "data"
    done = wallet("new", "savings", data_dir=root)
    assert done.code == 0, done.err
    phrase = done.lines[4].strip()
    assert len(phrase.split()) == 12
    assert "shown this once" in done.err
    key = kept(root, "savings")
    assert key.secret == key_of_phrase(phrase).secret
    assert show_address(key.address) in done.out
    assert key.secret.hex() not in done.out
    file = root / "wallets" / "savings.json"
    assert (mode(file), mode(file.parent), mode(root)) == (0o600, 0o700, 0o700)
    shown = wallet("show", data_dir=root).out
    assert phrase not in shown
    assert show_address(key.address) in shown


def test_longer_phrases_and_none(tmp_path):
    long = wallet("new", "long", "--words", "24", "--json", data_dir=tmp_path).json
    assert len(long["phrase"].split()) == 24
    assert show_address(key_of_phrase(long["phrase"]).address) == long["address"]
    assert long["path"] == str(tmp_path / "wallets" / "long.json")
    none = wallet("new", "none", "--no-phrase", "--json", data_dir=tmp_path)
    assert none.json["phrase"] is None
    assert none.err == ""
    assert wallet("new", "odd", "--words", "13", data_dir=tmp_path).code == 1


def test_a_phrase_opens_the_address_that_other_wallets_show(tmp_path):
    done = wallet("import", "old", "--phrase", "--json", data_dir=tmp_path, stdin=ABANDON + "\n")
    assert done.code == 0, done.err
    assert done.json["address"] == ABANDON_ADDRESS
    assert kept(tmp_path, "old").secret == key_of_phrase(ABANDON).secret


def test_a_mistyped_phrase_makes_no_wallet(tmp_path):
    done = wallet("import", "old", "--phrase", data_dir=tmp_path, stdin="abandon " * 12 + "\n")
    assert done.code == 1
    assert "checksum" in done.err
    assert not (tmp_path / "wallets").exists()


def test_a_keystore_from_elsewhere_keeps_its_password(tmp_path):
    file = tmp_path / "theirs.json"
    theirs = encrypt_key(KEY, PASSWORD, n=4)
    del theirs["address"]  # optional there; here wallets are listed without their passwords
    save_keystore(file, theirs)
    assert wallet("import", "geth", "--keystore", str(file), data_dir=tmp_path).code == 0
    assert kept(tmp_path, "geth").secret == KEY.secret
    shown = wallet("show", "--json", data_dir=tmp_path).json
    assert shown["wallets"][0]["address"] == show_address(KEY.address)
    wrong = wallet("import", "two", "--keystore", str(file), data_dir=tmp_path, password="correct horsf")
    assert (wrong.code, "wrong password" in wrong.err) == (1, True)


def test_a_secret_is_taken_from_a_file_that_nobody_else_can_read(tmp_path):
    file = tmp_path / "secret"
    assert wallet("import", "raw", "--secret-file", str(file), data_dir=tmp_path).code == 2
    assert not file.exists()
    file.write_text(KEY.secret.hex() + "\n")
    file.chmod(0o644)
    open_to_all = wallet("import", "raw", "--secret-file", str(file), data_dir=tmp_path)
    assert (open_to_all.code, "chmod 600" in open_to_all.err) == (1, True)
    file.chmod(0o600)
    assert wallet("import", "raw", "--secret-file", str(file), data_dir=tmp_path).code == 0
    assert kept(tmp_path, "raw").secret == KEY.secret


@pytest.mark.parametrize("options", [[], ["--phrase", "--keystore", "x"], ["--keystore", "x", "--secret-file", "y"]])
def test_a_key_comes_from_one_place(options, tmp_path):
    assert wallet("import", "name", *options, data_dir=tmp_path).code == 2


@pytest.mark.parametrize("command", [["new", "savings"], ["import", "savings", "--phrase"]])
def test_no_wallet_is_overwritten(command, tmp_path):
    wallet("new", "savings", data_dir=tmp_path)
    before = (tmp_path / "wallets" / "savings.json").read_bytes()
    done = wallet(*command, data_dir=tmp_path, stdin=ABANDON + "\n")
    assert (done.code, "already" in done.err) == (1, True)
    assert (tmp_path / "wallets" / "savings.json").read_bytes() == before


@pytest.mark.parametrize("name", ["node", "../evil", "a/b", "", ".hidden", "0xabc", "a" * 65, "ü", "a\n"])
def test_names_that_no_wallet_can_have(name, tmp_path):
    assert wallet("new", name, data_dir=tmp_path).code == 2
    assert list(tmp_path.iterdir()) == []


def test_passwords_come_from_the_environment_a_file_or_are_typed(tmp_path):
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    first = wallet("new", "file", "--password-file", str(file), data_dir=tmp_path, password="")
    typed = wallet("new", "typed", data_dir=tmp_path, password="", stdin=f"{PASSWORD}\n{PASSWORD}\n")
    assert (first.code, typed.code) == (0, 0), typed.err
    assert kept(tmp_path, "file")
    assert kept(tmp_path, "typed")


def test_passwords_that_will_not_do(tmp_path):
    for stdin, password, told in (
        (f"{PASSWORD}\n{PASSWORD}x\n", "", "differ"),
        ("short\nshort\n", "", "at least 8"),
        ("", "short", "at least 8"),
        (f"{PASSWORD}\n", "", "no answer"),
        ("", "", "no answer"),
    ):
        done = wallet("new", "savings", data_dir=tmp_path, stdin=stdin, password=password)
        assert done.code in (1, 2)
        assert told in done.err
        assert done.out == "", "a phrase that belongs to no wallet would be kept for nothing"
    missing = wallet("new", "savings", "--password-file", str(tmp_path / "none"), data_dir=tmp_path)
    assert missing.code == 2
    assert list(tmp_path.iterdir()) == []


def test_show_tells_the_node_and_the_wallets(tmp_path):
    nothing = wallet("show", data_dir=tmp_path)
    assert (nothing.code, "wallet new" in nothing.err) == (1, True)
    wallet("new", "savings", data_dir=tmp_path)
    only = wallet("show", "--json", data_dir=tmp_path).json
    assert [each["name"] for each in only["wallets"]] == ["savings"]
    assert "peer_id" not in only
    node = load_or_create_key(tmp_path / "node.key")
    both = wallet("show", data_dir=tmp_path).lines
    assert both[0].split() == ["address", show_address(node.address)]
    assert both[1].split()[0] == "peer_id"
    assert both[-2:] == ["wallet\taddress", f"savings\t{only['wallets'][0]['address']}"]


def test_a_wallet_is_exported_as_it_is(tmp_path):
    wallet("new", "savings", data_dir=tmp_path)
    out = tmp_path / "backup.json"
    assert wallet("export", "savings", "--out", str(out), data_dir=tmp_path, password="").code == 0
    assert mode(out) == 0o600
    assert decrypt_key(load_keystore(out), PASSWORD).secret == kept(tmp_path, "savings").secret
    again = wallet("export", "savings", "--out", str(out), data_dir=tmp_path)
    assert (again.code, "already" in again.err) == (1, True)


def test_the_nodes_key_is_exported_encrypted(tmp_path):
    assert wallet("export", "node", "--out", str(tmp_path / "x"), data_dir=tmp_path).code == 1
    node, out = load_or_create_key(tmp_path / "node.key"), tmp_path / "node.json"
    done = wallet("export", "node", "--out", str(out), "--json", data_dir=tmp_path)
    assert done.json["address"] == show_address(node.address)
    assert node.secret.hex() not in out.read_text()
    assert decrypt_key(load_keystore(out), PASSWORD).secret == node.secret


def test_a_bare_secret_takes_a_yes_and_the_password(tmp_path):
    wallet("new", "savings", data_dir=tmp_path)
    out = tmp_path / "secret"
    arguments = ["export", "savings", "--secret", "--out", str(out)]
    assert wallet(*arguments, data_dir=tmp_path).code == 2
    wrong = wallet(*arguments, "--yes", data_dir=tmp_path, password="correct horsf")
    assert (wrong.code, "wrong password" in wrong.err) == (1, True)
    assert not out.exists()
    assert wallet(*arguments, "--yes", data_dir=tmp_path).code == 0
    assert (out.read_text().strip(), mode(out)) == (kept(tmp_path, "savings").secret.hex(), 0o600)


def test_no_such_wallet(tmp_path):
    done = wallet("export", "nobody", "--out", str(tmp_path / "x"), data_dir=tmp_path)
    assert (done.code, "no wallet in" in done.err) == (1, True)


def test_a_typed_password_is_not_shown(tmp_path):
    """In a real terminal."""
    save_keystore(tmp_path / "theirs.json", encrypt_key(KEY, PASSWORD, n=2))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "blyan_node", "wallet", "import", "old", "--keystore", str(tmp_path / "theirs.json")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=environment(BLYAN_DATA_DIR=str(tmp_path)),
    )
    os.close(theirs)
    seen = b""
    while b"Password of theirs.json: " not in seen:
        seen += os.read(ours, 1024)
    os.write(ours, PASSWORD.encode() + b"\n")
    try:
        while chunk := os.read(ours, 1024):
            seen += chunk
    except OSError:  # the other side has closed
        pass
    assert process.wait(timeout=20) == 0, seen
    os.close(ours)
    assert PASSWORD.encode() not in seen
    assert kept(tmp_path, "old").secret == KEY.secret
