"""When and what this validator writes: records that wait to be carried, and acknowledgements of what others wrote."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

GATHER = 0.05  # seconds in which blocks of others are gathered before one acknowledgement answers them all
LOOK_AGAIN = 1.0
