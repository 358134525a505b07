"""A wallet's backup: 12 to 24 words (BIP-39), and the one key that is derived from them (BIP-32 along BIP-44's path).

The path is that of the first account of Ethereum wallets, so the words open the same address there.
"""

from __future__ import annotations

import hmac
import secrets
from typing import TYPE_CHECKING

from coincurve import PrivateKey

from blyan_node.chain.keys import Key
from blyan_node.errors import RequestError

if TYPE_CHECKING:
    from mnemonic import Mnemonic

HARDENED = 1 << 31
PATH = (44 + HARDENED, 60 + HARDENED, 0 + HARDENED, 0, 0)
"""m/44'/60'/0'/0/0"""
LENGTHS = (12, 15, 18, 21, 24)


def new_phrase(words: int = 12) -> str:
    """Draw a phrase from the system's randomness: twelve words are 128 bits, 24 are 256.

    Raises RequestError for a number of words that BIP-39 does not know.
    """
    if words not in LENGTHS:
        raise RequestError(f"a phrase has 12, 15, 18, 21 or 24 words, not {words}")
    return _words().to_mnemonic(secrets.token_bytes(words // 3 * 4))


def key_of_phrase(phrase: str, passphrase: str = "") -> Key:
    """Return the key behind a phrase of English words; case and spaces do not matter.

    ``passphrase`` is BIP-39's, part of the secret: another one gives another key. Raises RequestError that names what
    is wrong: the number of words, a word that is not in the list, the checksum.
    """
    words = phrase.lower().split()
    if len(words) not in LENGTHS:
        raise RequestError(f"a phrase has 12, 15, 18, 21 or 24 words; this one has {len(words)}")
    mnemonic = _words()
    for place, word in enumerate(words, 1):
        if word not in mnemonic.wordlist:
            raise RequestError(f"word {place} of the phrase is not in the list of words: mistyped?")
    if not mnemonic.check(" ".join(words)):
        raise RequestError("the phrase's checksum does not match: a word is wrong, or two have changed places")
    return derive(mnemonic.to_seed(" ".join(words), passphrase), PATH)


def derive(seed: bytes, path: tuple[int, ...]) -> Key:
    """Return the key at a path below a seed (BIP-32, private parent to private child).

    Raises RequestError where the path leads to no key, which happens once in 2**127 times.
    """
    secret, chain = _split(hmac.digest(b"Bitcoin seed", seed, "sha512"))
    for index in path:
        try:
            parent = PrivateKey(secret)
            shown = b"\0" + secret if index >= HARDENED else parent.public_key.format(compressed=True)
            tweak, chain = _split(hmac.digest(chain, shown + index.to_bytes(4, "big"), "sha512"))
            secret = parent.add(tweak).secret
        except ValueError as error:
            raise RequestError("this phrase leads to no key: make a new one") from error
    return Key(secret)


def _split(digest: bytes) -> tuple[bytes, bytes]:
    return digest[:32], digest[32:]


def _words() -> Mnemonic:
    from mnemonic import Mnemonic  # reads the list of words: for those who need it only

    return Mnemonic("english")
