"""``chain log``, ``chain show`` and ``validators``: the DAG, its cuts, and who decides them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from math import inf
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blyan_node.cli.common import (
    DataDirOption,
    JsonOption,
    bly,
    clean,
    data_dir_of,
    human_size,
    say,
    say_json,
    say_table,
    short,
)
from blyan_node.errors import RequestError

if TYPE_CHECKING:
    from blyan_node.api.client import Client
    from blyan_node.cli.dagdraw import Row, Rule

app = typer.Typer(help="The chain: blocks and cuts.", no_args_is_help=True)


class Chain(StrEnum):
    """A tag of blocks: meta, parameters, transactions."""

    A = "A"
    B = "B"
    T = "T"


PAGE = 100
DIGITS = 10
"""Of an id, as shown and as a prefix taken."""


@app.command(epilog="Example: blyan-node chain log -n 40 --chain T")
def log(
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many blocks.")] = 20,
    chain: Annotated[Chain | None, typer.Option(help="Only this chain.", case_sensitive=False)] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the newest blocks, children above their parents. A rule stands above the blocks that its cut made final."""
    from blyan_node.api.client import connect
    from blyan_node.cli.dagdraw import draw

    with connect(data_dir_of(data_dir)) as client:
        found = [block for name in ([chain] if chain else Chain) for block in _newest(client, name, number)]
        blocks = sorted(found, key=_place, reverse=True)[:number]
        cuts = _cuts(client, {block["cut"] for block in blocks} - {None})
        network = client.network()
    if as_json:
        say_json({"blocks": blocks, "cuts": list(cuts.values())})
        return
    if not blocks:
        say("There is no block yet.")
    for line in draw(_rows(blocks, cuts, network, whole=chain is None)):
        say(line)


@app.command(epilog="Example: blyan-node chain show 12")
def show(
    what: Annotated[
        str, typer.Argument(metavar="ID|K", help="A block's id (its first 10 digits do), or a cut's number.")
    ],
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a block with its records, or a cut with its signers."""
    from blyan_node.api.client import connect

    number = len(what) < DIGITS and what.isascii() and what.isdigit()
    with connect(data_dir_of(data_dir)) as client:
        shown = _cut(client, int(what)) if number else client.block(_whole_id(client, what.lower()))
    if as_json:
        say_json(shown)
    elif number:
        _show_cut(shown)
    else:
        _show_block(shown)


def validators(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show who decides what is final, and whether enough of them are connected."""
    from blyan_node.api.client import connect

    with connect(data_dir_of(data_dir)) as client:
        answer = client.validators()
    if as_json:
        say_json(answer)
        return
    total = int(answer["total_nano"])
    say_table(
        ["validator", "stake", "share", "next", "connected", "behind"],
        [
            [
                seat["address"],
                bly(seat["stake_nano"]),
                f"{100 * int(seat['stake_nano']) / total:.1f} %",
                _next(seat),
                "this node" if seat["here"] else "yes" if seat["connected"] else "no",
                "-" if seat["behind"] is None else _count(seat["behind"], "cut"),
            ]
            for seat in answer["data"]
        ],
    )
    for address in answer["slashed"]:
        say(f"slashed: {address}")
    say(_quorum(answer["data"], total))


def _next(seat: dict[str, Any]) -> str:
    """Its stake from the next cut on."""
    if seat["next_stake_nano"] == seat["stake_nano"]:
        return "same"
    return bly(seat["next_stake_nano"]) if int(seat["next_stake_nano"]) else "leaves"


def _quorum(seats: Sequence[dict[str, Any]], total: int) -> str:
    """Tell whether those that are connected can decide: they need more than 2/3 of the stake."""
    away = [seat for seat in seats if not (seat["here"] or seat["connected"]) and int(seat["stake_nano"])]
    stake = total - sum(int(seat["stake_nano"]) for seat in away)
    share = f"{100 * stake / total:.1f} % of the stake"
    if 3 * stake > 2 * total:
        return f"A quorum is connected: {share}."
    missing = ", ".join(seat["address"] for seat in away)
    return f"No quorum: {share} is connected and more than 2/3 is needed; nothing becomes final. Missing: {missing}"


def _newest(client: Client, chain: str, number: int) -> Iterator[dict[str, Any]]:
    """The newest blocks of a chain, at most ``number``."""
    after: str | None = None
    while number > 0:
        page = client.blocks(chain, min(number, PAGE), after)
        yield from page["data"]
        number -= len(page["data"])
        if (after := page["next"]) is None:
            return


def _place(block: dict[str, Any]) -> tuple[float, int, str]:
    """Where a block stands, from the first to the last: a parent's cut is never later, and its height is less."""
    return (inf if block["cut"] is None else block["cut"], block["height"], block["id"])


def _rows(
    blocks: Sequence[dict[str, Any]], cuts: dict[int, dict[str, Any]], network: dict[str, Any], *, whole: bool
) -> Iterator[Row | Rule]:
    """The drawing of blocks, newest first. Of one chain alone (not ``whole``), only the lines within it."""
    from blyan_node.cli.dagdraw import Row, Rule

    known = {block["id"] for block in blocks} | {network["network"]}
    cut = None
    for block in blocks:
        if block["cut"] != cut:
            cut = block["cut"]
            yield Rule(_title(cuts[cut]) if cut in cuts else f"cut {cut}")
        parents = tuple(parent for parent in block["parents"] if whole or parent in known)
        yield Row(block["id"], parents, _label(block))
    if any(network["network"] in block["parents"] for block in blocks):
        yield Row(network["network"], (), f"{network['network'][:DIGITS]} genesis of {network['name']}")


def _label(block: dict[str, Any]) -> str:
    where = f"{block['id'][:DIGITS]} {block['chain']} {clean(block['type'])} {short(block['author'])}"
    records = "pruned" if block["records"] is None else _count(block["records"], "record")
    return f"{where} {records}, {block['word']}"


def _title(cut: dict[str, Any]) -> str:
    return f"cut {cut['k']} · {_share(cut)} · round {cut['round']}"


def _share(cut: dict[str, Any]) -> str:
    """The part of the stake that signed: exact where it is a simple fraction."""
    from fractions import Fraction

    part = Fraction(int(cut["stake_nano"]), int(cut["total_nano"]))
    if part == 1:
        return "all stake"
    return f"{part} stake" if part.denominator <= 100 else f"{float(100 * part):.1f} % of stake"


def _cuts(client: Client, wanted: set[int]) -> dict[int, dict[str, Any]]:
    """Return cuts by number."""
    found: dict[int, dict[str, Any]] = {}
    if not wanted:
        return found
    # A page's cursor is the number of the cut before it, and cuts are numbered without gaps.
    after: str | None = str(max(wanted) + 1)
    while after is not None and int(after) > min(wanted):
        page = client.cuts(PAGE, after)
        found |= {cut["k"]: cut for cut in page["data"] if cut["k"] in wanted}
        after = page["next"]
    return found


def _cut(client: Client, k: int) -> dict[str, Any]:
    cut = _cuts(client, {k}).get(k)
    if cut is None:
        raise RequestError(f"there is no final cut {k}; see: blyan-node chain log")
    return cut


def _whole_id(client: Client, prefix: str) -> str:
    """Return the id of a block whose first digits are known, among the newest. Raises RequestError."""
    if re.fullmatch(rf"[0-9a-f]{{{DIGITS},64}}", prefix) is None:
        raise RequestError(
            f"{prefix!r} is neither a cut's number nor a block's id (at least {DIGITS} hex digits of it)"
        )
    if len(prefix) == 64:
        return prefix
    found = [block["id"] for chain in Chain for block in _newest(client, chain, PAGE)]
    matching = [id for id in found if id.startswith(prefix)]
    if len(matching) != 1:
        which = "no block" if not matching else "more than one block"
        raise RequestError(f"{which} among the newest {PAGE} of each chain begins with {prefix}; give the whole id")
    return str(matching[0])


def _show_cut(cut: dict[str, Any]) -> None:
    _say_facts(
        ("cut", f"{cut['k']}  {cut['id']}"),
        ("after", cut["prev_cut"]),
        ("round", str(cut["round"])),
        ("stake", f"{bly(cut['stake_nano'])} of {bly(cut['total_nano'])} BLY ({_share(cut)})"),
        ("state before", cut["prev_state_root"]),
        *(("head", head) for head in cut["heads"]),
        *(("signed by", signer) for signer in cut["signers"]),
    )


def _show_block(block: dict[str, Any]) -> None:
    final = "tentative" if block["cut"] is None else f"final, by cut {block['cut']}"
    _say_facts(
        ("block", block["id"]),
        ("chain", f"{block['chain']}, type {clean(block['type'])}"),
        ("author", f"{block['author']}, its block {block['seq']}"),
        ("height", str(block["height"])),
        *(("parent", parent) for parent in block["parents"]),
        ("anchored at", f"cut {block['anchor']['k']}"),
        ("written", f"{_when(block['timestamp_ms'])}, by the author's clock"),
        ("size", human_size(block["size"])),
        ("stands", final),
    )
    if block["records"] is None:
        say("its body was pruned: ask an archive (a node with archive = true) for its records")
    for record in block["records"] or ():
        say()
        _say_facts(
            ("record", record["id"]),
            ("kind", f"{clean(record['kind'])}  {_arguments(record['arguments'])}"),
            ("sender", f"{record['sender']}, nonce {record['nonce']}, fee {bly(record['fee_nano'])} BLY"),
            ("expires", "never" if record["expires_at_cut"] is None else f"after cut {record['expires_at_cut']}"),
            ("stands", record["word"] if record["void"] is None else f"{record['word']}, VOID: {record['void']}"),
        )


def _when(ms: int) -> str:
    """A time, as far as calendars go: an author may write any."""
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError):
        return f"{ms} ms"


def _arguments(arguments: dict[str, Any] | str) -> str:
    """What a record says, on one line; arguments that nobody could parse are hex."""
    if isinstance(arguments, str):
        return _clipped(arguments)
    said = []
    for name, value in arguments.items():
        if name.endswith("_nano"):
            said.append(f"{name.removesuffix('_nano')} {bly(value)} BLY")
        else:
            said.append(f"{name} {_clipped(str(value))}")
    return ", ".join(said)


def _clipped(text: str) -> str:
    return clean(text if len(text) <= 66 else f"{text[:65]}…")


def _say_facts(*facts: tuple[str, str]) -> None:
    for name, value in facts:
        say(f"{name:<13} {value}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
