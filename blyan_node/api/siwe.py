"""Sign-In with Ethereum: the message of EIP-4361, read, written and checked; the signature of EIP-191. Pure.

The grammar is strict, so that what is accepted is exactly what the wallet has shown: :func:`parse` takes a text only
if :meth:`Message.render` gives the same text back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from Crypto.Hash import keccak

from blyan_node.chain.keys import address_of, parse_address, recover, show_address
from blyan_node.errors import RequestError, RuleError, SignatureError

MAX_MESSAGE = 4096
_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:Z|[+-][0-9]{2}:[0-9]{2})"
# RFC 3986 without spaces and controls; what is compared with the configuration afterwards needs no finer grammar.
_URI = r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]*"
_STATEMENT = r"[A-Za-z0-9 :/?#\[\]@!$&'()*+,;=._~-]+"
_MESSAGE = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?(?P<domain>[!-.0-~]+)"
    r" wants you to sign in with your Ethereum account:\n"
    r"(?P<address>0x[0-9a-fA-F]{40})\n\n"
    rf"(?:(?P<statement>{_STATEMENT})\n)?\n"
    rf"URI: (?P<uri>{_URI})\n"
    r"Version: 1\n"
    r"Chain ID: (?P<chain_id>0|[1-9][0-9]{0,17})\n"
    r"Nonce: (?P<nonce>[A-Za-z0-9]{8,128})\n"
    rf"Issued At: (?P<issued_at>{_TIME})"
    rf"(?:\nExpiration Time: (?P<expires>{_TIME}))?"
    rf"(?:\nNot Before: (?P<not_before>{_TIME}))?"
    r"(?:\nRequest ID: (?P<request_id>[!-~]*))?"
    rf"(?P<resources>\nResources:(?:\n- {_URI})*)?"
)


@dataclass(frozen=True)
class Message:
    """A message of EIP-4361, version 1. Times are kept as written; ``resources`` None: the field is absent."""

    domain: str
    address: str
    uri: str
    chain_id: int
    nonce: str
    issued_at: str
    scheme: str | None = None
    statement: str | None = None
    expires: str | None = None
    not_before: str | None = None
    request_id: str | None = None
    resources: tuple[str, ...] | None = None

    def render(self) -> str:
        """Return the text that a wallet signs."""
        scheme = "" if self.scheme is None else f"{self.scheme}://"
        lines = [f"{scheme}{self.domain} wants you to sign in with your Ethereum account:", self.address, ""]
        lines += [] if self.statement is None else [self.statement]
        lines += ["", f"URI: {self.uri}", "Version: 1", f"Chain ID: {self.chain_id}", f"Nonce: {self.nonce}"]
        lines += [f"Issued At: {self.issued_at}"]
        lines += [] if self.expires is None else [f"Expiration Time: {self.expires}"]
        lines += [] if self.not_before is None else [f"Not Before: {self.not_before}"]
        lines += [] if self.request_id is None else [f"Request ID: {self.request_id}"]
        lines += [] if self.resources is None else ["Resources:", *(f"- {resource}" for resource in self.resources)]
        return "\n".join(lines)


def parse(text: str) -> Message:
    """Read a message. Raises RequestError where it is not one of EIP-4361, or its address's checksum is wrong."""
    found = _MESSAGE.fullmatch(text) if len(text) <= MAX_MESSAGE else None
    if found is None:
        raise RequestError("message is not a Sign-In with Ethereum message (EIP-4361, version 1)", param="message")
    parts = found.groupdict()
    resources = parts["resources"]
    message = Message(
        **parts
        | {
            "chain_id": int(parts["chain_id"]),
            "resources": None if resources is None else tuple(line[2:] for line in resources.split("\n")[2:]),
        }
    )
    if show_address(_address(message.address)) != message.address:
        raise RequestError("the message's address must be written with its checksum (EIP-55)", param="message")
    for moment in (message.issued_at, message.expires, message.not_before):
        if moment is not None:
            seconds_of(moment)
    return message


def seconds_of(moment: str) -> float:
    """Return a time of RFC 3339 as seconds since 1970. Raises RequestError where there is no such time."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (ValueError, OverflowError) as error:
        raise RequestError(f"the message's time {moment} does not exist", param="message") from error


def signer_of(text: str, signature: str) -> bytes:
    """Return the 20-byte address that signed a text as wallets do (EIP-191, ``personal_sign``).

    ``signature`` is hex, r | s | v, with ``v`` 27 or 28, or 0 or 1 as hardware wallets write it. Raises SignatureError.
    """
    digits = signature.removeprefix("0x")
    if re.fullmatch(r"[0-9a-fA-F]{130}", digits) is None:
        raise SignatureError("a signature is 65 bytes in hex")
    raw = bytes.fromhex(digits)
    if raw[64] not in (0, 1, 27, 28):
        raise SignatureError("a signature's last byte is 27 or 28")
    message = text.encode()
    told = b"\x19Ethereum Signed Message:\n%d%s" % (len(message), message)
    digest = keccak.new(digest_bits=256, data=told).digest()
    return address_of(recover(digest, raw[:64] + bytes([raw[64] % 27])))


def _address(text: str) -> bytes:
    try:
        return parse_address(text)
    except RuleError as error:
        raise RequestError(str(error), param="message") from error
