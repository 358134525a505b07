"""The keys that a person can pay with: the node's own, and the wallets in the data directory; and their passwords."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from getpass import getpass
from pathlib import Path

from blyan_node.chain.keys import Key, load_or_create_key, parse_address, show_address
from blyan_node.chain.keystore import LEAST_PASSWORD, decrypt_key, encrypt_key, load_keystore, save_keystore
from blyan_node.datadir import DataDir, explained
from blyan_node.errors import ConfigError, LocalError, RequestError, RuleError

NODE = "node"
"""The name of the node's own key as a wallet. Its file is not encrypted: the node must start by itself."""

PASSWORD_VARIABLE = "BLYAN_WALLET_PASSWORD"  # noqa: S105  (the name of a variable)

_NAME = re.compile(r"(?!0[xX])[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Wallet:
    """A key with a name. ``path`` is the keystore, or the node's key file."""

    name: str
    address: bytes
    path: Path

    def shown(self) -> dict[str, str]:
        """The wallet as JSON."""
        return {"name": self.name, "address": show_address(self.address), "path": str(self.path)}


@dataclass(frozen=True)
class Keyring:
    """The wallets of a data directory."""

    data: DataDir

    def path(self, name: str) -> Path:
        """Return where a wallet of this name lies. Raises ConfigError for a name that no wallet can have."""
        if name == NODE:
            return self.data.key
        if _NAME.fullmatch(name) is None:
            raise ConfigError(f"{name!r} is no wallet's name: up to 64 letters, digits, - and _, not beginning with 0x")
        return self.data.wallets / f"{name}.json"

    def names(self) -> list[str]:
        """Return the names of the wallets, without the node's key."""
        with explained(self.data.wallets):
            return sorted(file.stem for file in self.data.wallets.glob("*.json") if _NAME.fullmatch(file.stem))

    def wallet(self, name: str) -> Wallet:
        """Look a wallet up, without its password. Raises LocalError where there is none."""
        path = self.path(name)
        if name == NODE:
            return Wallet(name, self._node_key().address, path)
        keystore = load_keystore(path)
        try:
            address = keystore["address"] if isinstance(keystore, dict) else None
            return Wallet(name, parse_address("0x" + str(address).lower().removeprefix("0x")), path)
        except (KeyError, RuleError) as error:
            raise ConfigError(f"the wallet {path} names no address; import it again") from error

    def address(self, text: str) -> bytes:
        """Return the address that a person means: a wallet's, by name, or one written out, whose checksum is checked.

        Raises RuleError for an address with a slip in it, RequestError for a name that no wallet has.
        """
        if text[:2] in ("0x", "0X"):
            return parse_address(text)
        names = [NODE, *self.names()]
        if text not in names:
            raise RequestError(
                f"{text!r} is neither an address (0x and 40 hex digits) nor a wallet here ({', '.join(names)})"
            )
        return self.wallet(text).address

    def open(self, name: str, password_file: Path | None) -> Key:
        """Return a wallet's key, with its password. Raises RequestError where that is wrong."""
        if name == NODE:
            return self._node_key()
        keystore = load_keystore(self.path(name))
        return decrypt_key(keystore, ask_password(f"Password of the wallet {name}", password_file))

    def check_free(self, name: str) -> None:
        """Raise ConfigError or LocalError where a wallet cannot be given this name."""
        if name == NODE:
            raise ConfigError(f"the name {NODE} belongs to the node's own key; choose another")
        if (path := self.path(name)).exists():
            raise LocalError(f"there is a wallet {name} already, in {path}: choose another name; none is overwritten")

    def add(self, name: str, key: Key, password: str) -> Wallet:
        """Encrypt a key and keep it. Raises LocalError where there is such a wallet already."""
        return self.add_keystore(name, key, encrypt_key(key, password))

    def add_keystore(self, name: str, key: Key, keystore: object) -> Wallet:
        """Keep a keystore that ``key`` was decrypted from, with its password and its cost."""
        self.check_free(name)
        path = self.path(name)
        with explained(path):
            self.data.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fields = keystore if isinstance(keystore, dict) else {}
        save_keystore(path, fields | {"address": key.address.hex()})
        return Wallet(name, key.address, path)

    def _node_key(self) -> Key:
        if not self.data.key.exists():
            raise LocalError(f"there is no key {self.data.key} yet; the first blyan-node start makes it")
        return load_or_create_key(self.data.key)


def ask_password(question: str, file: Path | None) -> str:
    """Return a password: from a file (its first line), from the environment, or typed, hidden."""
    if file is not None:
        try:
            return file.read_text(encoding="utf-8").split("\n", 1)[0].removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the password from {file}: {error}") from error
    return os.environ.get(PASSWORD_VARIABLE) or ask_hidden(question)


def new_password(file: Path | None) -> str:
    """Return the password of a new wallet, typed twice where it is typed. Raises RequestError."""
    password = ask_password(f"New password (at least {LEAST_PASSWORD} characters)", file)
    if len(password) < LEAST_PASSWORD:
        raise RequestError(f"a password has at least {LEAST_PASSWORD} characters")
    typed = file is None and not os.environ.get(PASSWORD_VARIABLE)
    if typed and ask_hidden("The same password again") != password:
        raise RequestError("the two passwords differ; nothing was written")
    return password


def ask_hidden(question: str) -> str:
    """Ask a person for a secret, without showing it; scripts give it as a line of stdin. Raises ConfigError."""
    try:
        if sys.stdin.isatty():
            return getpass(f"{question}: ", stream=sys.stderr)
        if line := sys.stdin.readline():
            return line.rstrip("\r\n")
    except EOFError:
        pass
    raise ConfigError(f"no answer to the question: {question}")
