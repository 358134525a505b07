"""Serving the API: hypercorn's HTTP on sockets that we bind, inside a nursery that we end.

hypercorn's own ``serve`` is not used: it shields every write, so one client that reads nothing could hold up the end
of the program. Here each connection's writes have a deadline, and closing the sockets wakes whoever still writes.
"""

from __future__ import annotations

import errno
import logging

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, Framework
from hypercorn.utils import wrap_app
from starlette.types import ASGIApp

from blyan_node.errors import AlreadyRunning, ConfigError

MAX_CONNECTIONS = 4096
WRITE_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


async def open_api_listener(host: str, port: int) -> trio.SocketListener:
    """Bind; port 0 is chosen by the system. AlreadyRunning if the port is taken, ConfigError if it cannot be had."""
    try:
        listener, *others = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        # trio groups the errors of several address families in one OSError; then the first says enough.
        cause = error.__cause__.exceptions[0] if isinstance(error.__cause__, BaseExceptionGroup) else error
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            raise AlreadyRunning(
                f"port {port} on {host} is in use. Choose another with --api-port, or 0 for any free one."
            ) from error
        raise ConfigError(f"the API cannot listen on {host} port {port}: {cause}") from error
    for other in others:  # "localhost" may name two addresses; one is enough, and with port 0 they would differ
        await other.aclose()
    return listener


def api_url(listener: trio.SocketListener) -> str:
    """The base URL at which this machine reaches a listener."""
    host, port = listener.socket.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not bound to
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_api(
    app: ASGIApp,
    listener: trio.SocketListener,
    *,
    stop: trio.Event,
    grace: float = 3.0,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``stop`` is set; then accept nothing new, and give running requests ``grace`` seconds to end."""
    server = _Server(app)
    async with listener, trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(server.accept, listener, connections)
            task_status.started()
            await stop.wait()
            accepting.cancel_scope.cancel()
        await server.context.terminated.set()  # hypercorn then closes idle connections
        connections.cancel_scope.deadline = trio.current_time() + grace


class _Server:
    """What all connections share."""

    def __init__(self, app: ASGIApp) -> None:
        self.context = WorkerContext(None)
        self._config = Config()
        self._config.errorlog = log
        self._config.accesslog = None
        self._config.include_server_header = False
        framework: Framework = app  # type: ignore[assignment]  # starlette and hypercorn word the same types apart
        self._app = wrap_app(framework, 0, "asgi")
        self._open = 0

    async def accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        """Accept connections; beyond MAX_CONNECTIONS, new ones are closed at once."""
        await trio.serve_listeners(self._connection, [listener], handler_nursery=connections)

    async def _connection(self, stream: trio.SocketStream) -> None:
        if self._open >= MAX_CONNECTIONS:
            await stream.aclose()
            return
        self._open += 1
        bounded = _BoundedStream(stream)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bounded.close_on_cancel)
                await TCPServer(self._app, self._config, self.context, ConnectionState({}), bounded)  # type: ignore[arg-type]
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the client went away
        except* Exception:  # one connection's fault must not end the node
            log.exception("an HTTP connection failed unexpectedly")
        finally:
            self._open -= 1


class _BoundedStream:
    """What hypercorn uses of a stream, with a deadline on each write."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket

    async def send_all(self, data: bytes) -> None:
        """Write, or break the connection if the client does not read for WRITE_TIMEOUT_S."""
        with trio.move_on_after(WRITE_TIMEOUT_S) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            self.socket.close()
            raise trio.BrokenResourceError

    async def receive_some(self, most: int) -> bytes:
        """Read what is there."""
        return await self._stream.receive_some(most)

    async def send_eof(self) -> None:
        """End our side."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close both sides."""
        await self._stream.aclose()

    async def close_on_cancel(self) -> None:
        """Close the socket when the connection is cancelled: that wakes a write, which hypercorn shields."""
        try:
            await trio.sleep_forever()
        finally:
            self.socket.close()
