"""The web page at ``/``: a handful of files inside the package, which ask this API like any other client.

The files are listed here and read once, so no path of a request ever reaches the disk. They load nothing from elsewhere
and run no inline script, and the policy that is sent with them holds browsers to that.
"""

from __future__ import annotations

from importlib.resources import files

from starlette.responses import Response
from starlette.types import ASGIApp

from blyan_node.api.endpoints import Endpoint

SCRIPTS = ("api.js", "chain.js", "chat.js", "dom.js", "main.js", "swarm.js", "wallet.js")
FILES = {"/": "index.html", "/page/style.css": "style.css"} | {f"/page/{name}": name for name in SCRIPTS}

TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_endpoints() -> list[Endpoint]:
    """A row for each file. They are no part of the API's description."""
    folder = files("blyan_node.api").joinpath("static")
    return [
        Endpoint("GET", path, _file(folder.joinpath(name).read_bytes(), name), name, None, {}, bucket="page")
        for path, name in FILES.items()
    ]


def _file(content: bytes, name: str) -> ASGIApp:
    return Response(content, headers=HEADERS, media_type=TYPES[name.rpartition(".")[2]])
