"""Every error that this program raises on purpose. Each message says what is wrong and, to a user, what to do.

::

    BlyanError
    ├── RuleError            the data is wrong: whoever made it is at fault, retrying cannot help
    │   ├── CodecError           bytes that are not canonical, too large, too deep or of the wrong type
    │   ├── SignatureError       a signature that does not belong to its content
    │   ├── CycleDetected        parents of a block that are each other's ancestors
    │   ├── IntegrityError       weights or chunks that differ from what the chain says
    │   ├── CheckpointError      a model file that cannot be used (corrupt, missing tensor, unknown family)
    │   └── RequestError         a caller asked for something that cannot be (prompt too long, bad parameter)
    │       └── UnknownModel         no model of that name is on the chain
    ├── PeerError            the peer is at fault, or gone: another peer may do better
    │   ├── Unreachable          no connection could be made
    │   ├── ChannelClosed        the stream to the peer ended
    │   ├── PeerTimeout          the peer did not answer in time
    │   ├── ProtocolViolation    the peer sent what the protocol forbids
    │   └── Refused              the peer said no, with a reason
    └── LocalError           we are: configuration, disk, port, resources of this machine
        ├── ConfigError          a setting that cannot be used
        ├── AlreadyRunning       another process holds the data directory or the port
        ├── StoreError           the database or the disk failed
        │   └── DiskFull             no space left, or the operator's cap is reached
        ├── ModelUnavailable     the swarm cannot run this model now; the message names the missing units
        ├── Overloaded           too much work here; try again later
        └── GenerationFailed     a generation ended early; carries the partial text
"""

from __future__ import annotations


class BlyanError(Exception):
    """Root of all errors of this program."""


class RuleError(BlyanError):
    """The data is wrong."""


class CodecError(RuleError):
    """Bytes that are not canonical, too large, too deep or of the wrong type."""


class SignatureError(RuleError):
    """A signature that does not belong to its content."""


class CycleDetected(RuleError):
    """A block names parents of which one is an ancestor of another, or an imported graph has a cycle."""


class IntegrityError(RuleError):
    """Weights or chunks that differ from what the chain says."""


class CheckpointError(RuleError):
    """A model file that cannot be used."""


class RequestError(RuleError):
    """A caller asked for something that cannot be.

    ``param`` names the offending field, as OpenAI's errors do.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(RequestError):
    """No model of that name is on the chain."""


class PeerError(BlyanError):
    """The peer is at fault, or gone."""


class Unreachable(PeerError):
    """No connection to the peer could be made."""


class ChannelClosed(PeerError):
    """The stream to the peer ended."""


class PeerTimeout(PeerError):
    """The peer did not answer in time."""


class ProtocolViolation(PeerError):
    """The peer sent what the protocol forbids."""


class Refused(PeerError):
    """The peer said no, with a reason."""


class LocalError(BlyanError):
    """This machine, its configuration or its load is at fault."""


class ConfigError(LocalError):
    """A setting that cannot be used."""


class AlreadyRunning(LocalError):
    """Another process holds the data directory or the port."""


class StoreError(LocalError):
    """The database or the disk failed."""


class DiskFull(StoreError):
    """No space left on the device, or the operator's cap is reached."""


class ModelUnavailable(LocalError):
    """The swarm cannot run this model now; the message names the missing units."""


class Overloaded(LocalError):
    """Too much work here; try again later."""


class GenerationFailed(LocalError):
    """A generation ended early. ``partial`` is the text emitted so far, which stands."""

    def __init__(self, message: str, *, partial: str = "") -> None:
        super().__init__(message)
        self.partial = partial
