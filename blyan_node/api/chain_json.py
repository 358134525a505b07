"""What the chain holds, as JSON: amounts are decimal strings in fields that end in ``_nano``, since readers of JSON
lose whole numbers above 2^53; addresses are EIP-55; other bytes are hex.
"""  # noqa: D205

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from blyan_node.api.chain_service import BlockInfo, CutInfo, Entry, Holdings, NetworkInfo, Seat, Validators
from blyan_node.chain.genesis import Money
from blyan_node.chain.keys import show_address
from blyan_node.chain.records import Address, Amount, Manifest, Record
from blyan_node.chain.view import Holding, Standing
from blyan_node.codec import MAX_INT
from blyan_node.errors import RuleError

Json = dict[str, Any]

_TEXTS = {(Manifest, "spec")}
"""Fields of bytes that hold text."""


def block_json(info: BlockInfo) -> Json:
    """A block without its records; None stands for those of a body that was pruned."""
    block, header = info.block, info.block.header
    return {
        "id": block.id.hex(),
        "chain": header.chain,
        "type": header.type,
        "author": show_address(header.author),
        "seq": header.seq,
        "height": header.height,
        "parents": [parent.hex() for parent in header.parents],
        "anchor": {"k": header.anchor.k, "cut": header.anchor.cut.hex()},
        "timestamp_ms": header.timestamp_ms,
        "records": None if block.is_stripped else len(block.records),
        "size": len(block.raw),
        "word": "tentative" if info.cut is None else "final",
        "cut": info.cut,
    }


def record_json(record: Record, standing: Standing | None) -> Json:
    """A record of a block."""
    return {
        "id": record.id.hex(),
        "kind": record.kind,
        "sender": show_address(record.sender),
        "nonce": record.nonce,
        "fee_nano": str(record.fee),
        "expires_at_cut": None if record.expires_at_cut == MAX_INT else record.expires_at_cut,
        "arguments": _arguments(record),
        **standing_json(standing),
    }


def standing_json(standing: Standing | None) -> Json:
    """Where a record stands; None: it only waits here."""
    if standing is None:
        return {"word": "pending", "void": None}
    return {"word": standing.word, "void": None if standing.void is None else standing.void.value}


def cut_json(info: CutInfo) -> Json:
    """A final cut, and who signed it."""
    cut, signers = info.cut, [signed.validator for signed in info.certificate.signatures]
    return {
        "k": cut.k,
        "id": cut.id.hex(),
        "prev_cut": cut.prev_cut.hex(),
        "heads": [head.hex() for head in cut.heads],
        "prev_state_root": cut.prev_state_root.hex(),
        "round": info.certificate.round,
        "signers": [show_address(signer) for signer in signers],
        "stake_nano": str(info.validators.stake_of(signers)),
        "total_nano": str(info.validators.total),
    }


def holdings_json(address: bytes, holdings: Holdings) -> Json:
    """What an address owns."""
    return {
        "address": show_address(address),
        "final": _holding(holdings.final),
        "tentative": _holding(holdings.tentative),
        "next_nonce": holdings.next_nonce,
        "bonds": [
            {"validator": show_address(validator), "amount_nano": str(amount)}
            for validator, amount in holdings.bonds.items()
        ],
    }


def _holding(holding: Holding) -> Json:
    return {
        "k": holding.k,
        "balance_nano": str(holding.balance),
        "nonce": holding.nonce,
        "bonded_nano": str(holding.bonded),
        "unbonding_nano": str(holding.unbonding),
    }


def entry_json(entry: Entry) -> Json:
    """An entry of a history."""
    movement = entry.movement
    return {
        "word": entry.word,
        "k": movement.k,
        "kind": movement.kind,
        "record": movement.source.hex(),
        "other": None if movement.other is None else show_address(movement.other),
        "amount_nano": str(movement.amount),
        "fee_nano": str(movement.fee),
        "balance_nano": str(movement.balance),
    }


def validators_json(validators: Validators) -> Json:
    """Who decides, and who of them is missing."""
    total = validators.deciding.total
    return {
        "k": validators.k,
        "total_nano": str(total),
        "quorum_nano": str(2 * total // 3 + 1),
        "data": [_seat(seat, validators.k) for seat in validators.seats],
        "slashed": [show_address(address) for address in validators.slashed],
        "missing": [show_address(seat.address) for seat in validators.seats if seat.final is None],
    }


def _seat(seat: Seat, k: int) -> Json:
    return {
        "address": show_address(seat.address),
        "stake_nano": str(seat.stake),
        "next_stake_nano": str(seat.next_stake),
        "here": seat.here,
        "connected": seat.final is not None,
        "behind": None if seat.final is None else max(0, k - seat.final),
    }


def network_json(network: NetworkInfo) -> Json:
    """The network and its last final cut."""
    genesis = network.genesis
    return {
        "name": genesis.name,
        "network": genesis.network.hex(),
        "created_ms": genesis.created_ms,
        "parameters": _plain(genesis.parameters),
        "supply_nano": str(network.supply),
        "final": {"k": network.k, "cut": network.cut.hex(), "state_root": network.state_root.hex()},
        "genesis": genesis.to_toml(),
        "pending": network.pending,
    }


def _arguments(record: Record) -> Json | str:
    """Typed arguments by name; those that do not parse as they are, in hex."""
    try:
        return _plain(record.parsed())
    except RuleError:
        return record.arguments.hex()


def _plain(item: Any) -> Json:
    """Any dataclass of the chain, by its type hints."""
    hints = get_type_hints(type(item), include_extras=True)
    shaped: Json = {}
    for each in fields(item):
        value, hint = getattr(item, each.name), hints[each.name]
        if hint in (Amount, Money):
            shaped[f"{each.name}_nano"] = str(value)
        elif hint == Address:
            shaped[each.name] = show_address(value)
        elif (type(item), each.name) in _TEXTS:
            shaped[each.name] = value.decode(errors="replace")
        else:
            shaped[each.name] = _value(value)
    return shaped


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_value(part) for part in value]
    return _plain(value) if is_dataclass(value) else value
