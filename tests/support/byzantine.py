"""Byzantine validators for the simulator: they know the protocol and lie as well as they can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blyan_node.chain.cut import PREVOTE, Cut, Proposal, Vote, sign_proposal, sign_vote
from blyan_node.chain.effects import Effect, Send, SendCuts
from tests.support.simulator import Node, Simulation
from tests.support.universe import NETWORK, FastSigner

STYLES = ("silent", "echo", "split", "leave", "withhold", "starve", "fork")


class Twin(Node):
    """Honest code, but the same key runs twice (arXiv 2004.10617), mostly on different sides of a partition."""

    is_honest = False


class Byzantine(Node):
    """Runs the honest core and distorts what leaves it.

    ``silent`` says nothing. ``echo`` votes, to each peer, for what that peer votes for. ``split`` tells a half of the
    peers its vote and the others nil, and proposes two cuts. ``leave`` does so for a while, then falls silent.
    ``withhold`` sends what it says to some. ``starve``
    proposes cuts that leave out what others wrote. ``fork`` writes two blocks in one place.
    """

    is_honest = False

    def __init__(self, net: Simulation, number: int, address: bytes, style: str) -> None:
        self.style = style
        self.seen_heads: list[tuple[bytes, ...]] = []
        super().__init__(net, number, address)

    @property
    def signer(self) -> FastSigner:
        return FastSigner(self.address)

    @property
    def is_silent(self) -> bool:
        return self.style == "silent" or (self.style == "leave" and self.net.now > self.net.settings.chaos_ms)

    def others(self) -> list[Node]:
        return [node for node in self.net.nodes if node is not self]

    def execute(self, effect: Effect) -> None:
        if not (self.is_silent and isinstance(effect, Send | SendCuts)):
            super().execute(effect)

    def run(self, effects: list[Effect]) -> None:
        heads = self.heads_for_cut() if self.style in ("split", "leave") else ()
        if heads and heads not in self.seen_heads:
            self.seen_heads = [*self.seen_heads[-4:], heads]
        super().run(effects)

    def broadcast(self, message: Any) -> None:
        if self.is_silent:
            return
        is_own = isinstance(message, Vote) or (isinstance(message, Proposal) and message.proposer == self.address)
        for node in self.others():
            if self.style == "withhold" and self.net.random.random() < 0.5:
                continue
            lie = self.distort(message) if is_own and self.net.random.random() < 0.6 else message
            self.net.send(self, node.number, "bft", lie)

    def distort(self, message: Vote | Proposal) -> Vote | Proposal:
        if isinstance(message, Proposal):
            if self.style == "starve":
                return self.propose(message, self.starving_heads())
            if self.style in ("split", "leave") and self.seen_heads:
                return self.propose(message, self.net.random.choice(self.seen_heads))
            return message
        if self.style in ("split", "leave", "echo"):
            return self.vote(message, self.net.random.choice([None, message.cut]))
        return message

    def vote(self, like: Vote, cut: bytes | None) -> Vote:
        return sign_vote(self.signer, NETWORK, k=like.k, round=like.round, step=like.step, cut=cut)

    def propose(self, like: Proposal, heads: tuple[bytes, ...]) -> Proposal:
        cut: Cut = replace(like.cut, heads=heads)
        return sign_proposal(self.signer, NETWORK, round=like.round, valid_round=None, cut=cut)

    def starving_heads(self) -> tuple[bytes, ...]:
        """The previous cut, and one block that builds on nothing newer."""
        if self.base.prev_heads == (NETWORK,):
            return self.base.prev_heads if self.last is None else (self.last.id,)
        seq = self.last.seq + 1 if self.last else 0
        parents = [*self.base.prev_heads, *([self.last.id] if self.last else [])]
        antichain = [block.id for block in self.net.all.antichain(parents)]
        block = self.net.all.write(self.address, seq, self.base.k - 1, True, antichain)
        self.spread(block)
        return (block.id,)

    def receive(self, source: int, kind: str, content: Any) -> None:
        super().receive(source, kind, content)
        if not self.alive or kind != "bft" or not isinstance(content, Vote | Proposal):
            return
        if self.style == "echo" and isinstance(content, Proposal):
            for step in (PREVOTE, PREVOTE + 1):
                vote = sign_vote(self.signer, NETWORK, k=content.k, round=content.round, step=step, cut=content.cut.id)
                self.net.send(self, source, "bft", vote)
        elif self.style == "echo" and isinstance(content, Vote) and content.validator != self.address:
            self.net.send(self, source, "bft", self.vote(content, content.cut))

    def write(self, *, payload: bool) -> None:
        if self.is_silent:
            return
        if self.style != "fork" or self.last is None or self.net.random.random() < 0.7:
            super().write(payload=payload)
            return
        one, other = (self.branch(payload=True) for _ in range(2))
        for node in self.others():
            self.net.send(self, node.number, "blocks", [self.net.random.choice([one, other])])
        self.accept(one, self.number)  # and from here on it goes on with one branch, as far as anybody builds on it
        self.accept(other, self.number)

    def branch(self, *, payload: bool) -> Any:
        assert self.last is not None
        parents = [block.id for block in self.net.all.antichain([*self.last.parents, self.last.id])]
        return self.net.all.write(self.address, self.last.seq + 1, self.base.k - 1, payload, parents)
