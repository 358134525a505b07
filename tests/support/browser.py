"""Headless Chromium, driven over the DevTools protocol: enough of it to use a page like a person, and to look at it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, open_websocket_url

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")
SWITCHES = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--remote-debugging-port=0",
)  # fmt: skip
KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}


@dataclass
class Page:
    """A tab. ``complaints`` are errors of its console, and exceptions that nothing caught."""

    _socket: WebSocketConnection
    complaints: list[str] = field(default_factory=list)
    _answers: dict[int, Any] = field(default_factory=dict)
    _waiting: dict[int, trio.Event] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _session: str | None = None

    async def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        arrived = self._waiting[number] = trio.Event()
        session = {} if self._session is None else {"sessionId": self._session}
        await self._socket.send_message(json.dumps({"id": number, "method": method, "params": parameters} | session))
        await arrived.wait()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    async def listen(self) -> None:
        while True:
            try:
                message = json.loads(await self._socket.get_message())
            except ConnectionClosed:
                return
            if "id" in message:
                self._answers[message["id"]] = message
                self._waiting.pop(message["id"]).set()
            elif message["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.complaints.append(str(message["params"]["entry"]))

    async def attach(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")

    async def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Be of another size, and in light or dark."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def open(self, url: str) -> None:
        """Go to a page, and wait until all of it is there."""
        await self.call("Page.navigate", url=url)
        await self.until("location.protocol === 'http:' && document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, *, within: float = 20) -> None:
        """Wait until an expression is truthy."""
        with trio.move_on_after(within):
            while not await self.evaluate(f"!!({expression})"):
                await trio.sleep(0.05)
            return
        raise AssertionError(f"not within {within} s: {expression}; the page says: {await self.text('body')}")

    async def text(self, selector: str) -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    async def picture(self, path: Path) -> None:
        """Write a PNG of what is seen."""
        shot = await self.call("Page.captureScreenshot", format="png")
        await trio.Path(path).write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """A fresh browser with one tab, ended with the block."""
    assert PROGRAM is not None
    async with trio.open_nursery() as nursery:
        command = [PROGRAM, *SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        process = await nursery.start(_run, command)
        try:
            with trio.fail_after(60):
                url = await _address(process)
            async with open_websocket_url(url, max_message_size=64 * 2**20) as socket:
                page = Page(socket)
                nursery.start_soon(page.listen)
                await page.attach()
                yield page
        finally:
            process.kill()


async def _run(command: list[str], task_status: trio.TaskStatus[trio.Process]) -> None:
    await trio.run_process(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, check=False, task_status=task_status
    )


async def _address(process: trio.Process) -> str:
    assert process.stderr is not None
    told = b""
    async for part in process.stderr:
        told += part
        for line in told.decode(errors="replace").splitlines():
            if line.startswith("DevTools listening on "):
                return line.removeprefix("DevTools listening on ").strip()
    raise AssertionError(f"Chromium ended: {told.decode(errors='replace')}")
