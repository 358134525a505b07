"""A queue of frames bounded in number and in bytes, taken in batches."""

from __future__ import annotations

from collections import deque

import trio

from blyan_node.errors import ChannelClosed


class FrameBuffer:
    """Frames on their way, first in, first out.

    When full, :meth:`put` waits, first come, first served; nothing is ever dropped. A frame larger than the bound in
    bytes is let in alone. All methods are safe under cancellation: a cancelled put has put nothing, a cancelled take
    has taken nothing.
    """

    def __init__(self, *, frames: int, size: int) -> None:
        self._most_frames, self._most_bytes = frames, size
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._closed = False
        self._writers, self._readers = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._frames)

    async def put(self, frame: bytes) -> None:
        """Queue a frame once there is room; raise ChannelClosed once closed."""
        while not self._closed and self._is_full(len(frame)):
            await self._writers.park()
        if self._closed:
            raise ChannelClosed("the channel was lost")
        self._frames.append(frame)
        self._bytes += len(frame)
        self.wake()

    async def take(self, most: int) -> list[bytes]:
        """Take what is queued, up to ``most`` bytes but at least one frame.

        Returns an empty list if woken without a frame, or, at once, when closed and empty.
        """
        if not self._frames and not self._closed:
            await self._readers.park()
        taken: list[bytes] = []
        size = 0
        while self._frames and (not taken or size + len(self._frames[0]) <= most):
            taken.append(self._frames.popleft())
            size += len(taken[-1])
        self._bytes -= size
        if taken:
            self._writers.unpark_all()
        return taken

    def wake(self) -> None:
        """Let a waiting take() return, even without a frame."""
        self._readers.unpark_all()

    def close(self) -> None:
        """Refuse further frames, and wake everybody; what is queued can still be taken."""
        self._closed = True
        self._writers.unpark_all()
        self.wake()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def _is_full(self, more: int) -> bool:
        return len(self._frames) >= self._most_frames or (self._bytes > 0 and self._bytes + more > self._most_bytes)
