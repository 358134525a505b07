"""The web page of a real node in a real browser: it chats through the swarm, and follows what happens to it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from blyan_node.testnet.local import Testnet, wait_until
from tests.support.browser import browser, needs_browser
from tests.support.daemons import EXACT, PART, WITHIN, publish
from tests.support.models import tiny_checkpoint
from tests.support.payments import key_of, next_nonce, submit, transfer

pytestmark = [pytest.mark.e2e, pytest.mark.long, needs_browser]


async def test_the_page_chats_and_follows_the_swarm_and_the_chain(tmp_path: Path) -> None:
    with Testnet(tmp_path / "net", nodes=3, memory_limit=str(PART), settings=EXACT) as net:
        node = net.node(0)
        publish(node.client, tiny_checkpoint(tmp_path), "tiny")
        await trio.to_thread.run_sync(partial(wait_until, net.serving, timeout=WITHIN, what="all nodes serving"))
        async with browser(tmp_path / "profile") as page:
            await page.open(f"{node.client.url}/#key={node.directory.read_token()}")
            await page.until("document.querySelector('#model option')")
            await page.type("Tell me of the sea")
            await page.press("Enter")
            await page.until("document.querySelector('#talk .assistant:not([aria-busy])')", within=WITHIN)
            assert await page.text("#talk .assistant")
            assert await page.evaluate("document.querySelectorAll('#route li').length") > 1

            await page.evaluate("document.getElementById('tab-chain').click()")
            await page.until("document.querySelector('#chain circle.final')", within=WITHIN)
            before = await page.evaluate("document.querySelectorAll('#chain circle').length")
            payer = net.node(1)
            submit(payer, transfer(net, key_of(payer), key_of(node).address, 1, nonce=next_nonce(payer, key_of(payer))))
            await page.until(f"document.querySelectorAll('#chain circle').length > {before}", within=WITHIN)

            await page.evaluate("document.getElementById('tab-swarm').click()")
            await page.until("document.querySelector('#swarm article:not(.gap)')", within=WITHIN)
            net.kill(1)
            net.kill(2)
            await page.until("document.querySelector('#swarm article.gap')", within=WITHIN)
            assert "nobody serves" in await page.text("#swarm .told")
            assert page.complaints == []
