"""uvicorn around the application: says where it listens, and ends cleanly on SIGINT and SIGTERM."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from pagedkv.errors import ConfigError
from pagedkv.sims.serve.serve_loop import ServeLoop

_LAST_WORDS_S = 5
"""How long connections may take to read the ends of their answers. Chosen: longer than a retransmission, shorter than patience."""
_KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than clients keep theirs (httpx: 5 s, as uvicorn by default), else both may close
it while a request is on its way. Source: keepalive_timeout of nginx."""

_LOOK_S = 0.1
"""How often to look whether a second signal came. Chosen: at once, to a person; uvicorn looks as often."""


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that has an address and does not listen yet.

    Raises:
        ConfigError: If the address is taken, or none of this machine's.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {reason}; --port 0 finds one that is free") from error
    return bound


class Server(uvicorn.Server):
    """Serves until a signal comes; then answers end, within a grace period by themselves, and then it is over."""

    def __init__(self, app: Any, loop: ServeLoop, *, grace_s: float, told: Callable[[str], None]) -> None:
        """Serve on the sockets that `serve` is given, and tell their addresses to `told` once they listen."""
        config = uvicorn.Config(
            app,
            lifespan="on",
            access_log=False,
            log_level="warning",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
        super().__init__(config)
        self._loop, self._grace_s, self._told = loop, grace_s, told
        self._hurried = False
        """A second signal came: nobody waits for answers any more."""

    def end(self) -> None:
        """Shut down, as a signal would. For any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell where."""
        await super().startup(sockets)
        for listening in sockets or ():
            host, port = listening.getsockname()[:2]
            self._told(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers end, then close connections."""
        closing = asyncio.ensure_future(self._loop.close(self._grace_s))
        while not (self._hurried or closing.done()):
            await asyncio.wait({closing}, timeout=_LOOK_S)
        await self._loop.close(0.0)
        await closing
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down; told a second time, end answers at once, and a third time by SIGINT, do not wait for their readers either."""
        if self.should_exit and not self._hurried:
            self._hurried = True
        else:
            super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on either signal; unlike uvicorn's own, do not raise it again when all is over: that was a clean end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
