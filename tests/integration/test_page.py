"""The web page in a real browser, over a scripted node: it chats, draws, and nothing that it is told gets to run."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from blyan_node.api.page import FILES
from blyan_node.api.service import ModelStatus
from blyan_node.chain.keys import show_address
from tests.support.api import TOKEN, Served, served
from tests.support.browser import Page, browser, needs_browser
from tests.support.chains import KEYS
from tests.support.service import ScriptedService

EVIL = "</script><img src=x onerror=alert(1)><b>bold</b>"


@asynccontextmanager
async def page(tmp_path: Path, service: ScriptedService | None = None) -> AsyncIterator[tuple[Page, Served]]:
    service = service or ScriptedService()
    status = replace(service.status(), address=show_address(KEYS[0].address))
    service.status = lambda: status
    async with served(service, requests_per_minute=10_000) as api, browser(tmp_path / "profile") as tab:
        yield tab, api


async def test_the_files_need_no_key_and_come_with_a_strict_policy():
    async with served() as api:
        api.client.headers.clear()
        for path in FILES:
            answer = await api.client.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in (
            "/page/../auth.py",
            "/page/%2e%2e/app.py",
            "/page/",
            "/page/secret",
            "/static/main.js",
            "//etc/passwd",
        ):
            answer = await api.client.get(path)
            assert answer.status_code in (401, 404), path


async def test_the_page_loads_nothing_from_elsewhere_and_names_no_file_that_is_not_there():
    async with served() as api:
        for path, name in FILES.items():
            text = (await api.client.get(path)).text
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
            for used in re.findall(r'from "\./([^"]+)"|(?:src|href)="page/([^"]+)"', text):
                assert f"/page/{''.join(used)}" in FILES, name
            assert "innerHTML" not in text


@needs_browser
async def test_a_chat_streams_and_its_route_is_drawn(tmp_path: Path):
    async with page(tmp_path) as (tab, api):
        await tab.open(f"{api.url}/#key={TOKEN}")
        await tab.until("document.querySelector('#model option')")
        assert await tab.evaluate("location.hash") == ""
        await tab.type("Hi there")
        await tab.press("Enter")
        await tab.until("document.querySelector('#talk .assistant:not([aria-busy])')")
        assert await tab.text("#talk .user") == "Hi there"
        assert await tab.text("#talk .assistant") == "Hello wörld!"
        assert await tab.evaluate("document.querySelectorAll('#route li').length") == 2
        assert "computed on 2 nodes" in await tab.text("#route figcaption")
        assert "2.0 ms" in await tab.text("#route li:last-child")
        assert tab.complaints == []


@needs_browser
async def test_escape_stops_an_answer_on_the_node_too(tmp_path: Path):
    service = ScriptedService(hang=True)
    async with page(tmp_path, service) as (tab, api):
        await tab.open(f"{api.url}/#key={TOKEN}")
        await tab.until("document.querySelector('#model option')")
        await tab.type("Hi")
        await tab.press("Enter")
        await tab.until("document.querySelector('#talk .assistant')?.textContent.includes('wörld')")
        await tab.press("Escape")
        with trio.fail_after(10):
            await service.left.wait()
        await tab.until("document.querySelector('#talk .fault')?.textContent.includes('stopped')")
        assert not await tab.evaluate("document.getElementById('send').hidden")


@needs_browser
async def test_without_a_key_the_page_asks_for_one(tmp_path: Path):
    async with page(tmp_path) as (tab, api):
        await tab.open(f"{api.url}/")
        await tab.evaluate("document.getElementById('tab-swarm').click()")
        await tab.until("document.getElementById('keydialog').open")
        await tab.until("document.activeElement.id === 'key'")
        await tab.type(TOKEN)
        await tab.press("Enter")
        await tab.until("document.querySelector('#swarm table')")


@needs_browser
async def test_every_view_is_reached_by_keyboard_and_tells_what_the_node_tells(tmp_path: Path):
    gap = ModelStatus("tiny", "11" * 32, ("embed", "layer.0", "head"), (0, 1, 2), (0,), (2, 0, 1), True)
    service = ScriptedService()
    status = replace(service.status(), models=(gap,))
    service.status = lambda: status
    async with page(tmp_path, service) as (tab, api):
        await tab.open(f"{api.url}/#key={TOKEN}")
        await tab.until("document.querySelector('#model option')")
        await tab.evaluate("document.getElementById('tab-chat').focus()")
        await tab.press("ArrowRight")
        await tab.until("document.querySelector('#swarm article.gap')")
        assert "nobody serves layer.0" in await tab.text("#swarm .told")
        assert await tab.evaluate("document.querySelector('#swarm .served-0').title") == "layer.0: 0 peers"
        await tab.press("ArrowRight")
        await tab.until("document.querySelector('#chain circle.block')")
        blocks = await tab.evaluate("document.querySelectorAll('#chain circle.block').length")
        assert blocks > 0
        assert await tab.evaluate("document.querySelectorAll('#chain circle.final').length") < blocks
        await tab.press("ArrowRight")
        await tab.until("document.querySelector('#wallet table')")
        assert "balance" in await tab.text("#wallet table")
        await tab.press("ArrowRight")
        await tab.until("!document.getElementById('chat').hidden")


@needs_browser
async def test_text_that_tries_to_be_markup_stays_text(tmp_path: Path):
    service = ScriptedService(words=(EVIL,))
    status = replace(service.status(), network_name=EVIL)
    service.status = lambda: status
    async with page(tmp_path, service) as (tab, api):
        await tab.open(f"{api.url}/#key={TOKEN}")
        await tab.until("document.querySelector('#model option')")
        await tab.type(EVIL)
        await tab.press("Enter")
        await tab.until("document.querySelector('#talk .assistant:not([aria-busy])')")
        assert await tab.text("#talk .assistant") == EVIL
        await tab.evaluate("document.getElementById('tab-swarm').click()")
        await tab.until("document.querySelector('#swarm table')")
        assert EVIL in await tab.text("#swarm")
        assert await tab.evaluate("document.querySelectorAll('main img, main b b').length") == 0
        assert tab.complaints == []


@needs_browser
async def test_nothing_overflows_on_a_phone_or_a_desk_in_light_or_dark(tmp_path: Path):
    async with page(tmp_path) as (tab, api):
        await tab.open(f"{api.url}/#key={TOKEN}")
        await tab.until("document.querySelector('#model option')")
        await tab.type("Hi there")
        await tab.press("Enter")
        await tab.until("document.querySelector('#talk .assistant:not([aria-busy])')")
        for width, height, dark in ((390, 844, False), (390, 844, True), (1280, 800, False), (1280, 800, True)):
            await tab.look(width, height, dark=dark)
            for name in ("chat", "swarm", "chain", "wallet"):
                await tab.evaluate(f"document.getElementById('tab-{name}').click()")
                await tab.until(f"!document.getElementById('{name}').hidden")
                await tab.until(f"document.getElementById('{name}').childElementCount > 0")
                assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
                await tab.picture(tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png")
