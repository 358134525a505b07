"""Fetching a checkpoint from a model hub, for ``hf:REPO``. The one part of the program that asks a central server."""

from __future__ import annotations

import re
from pathlib import Path

from blyan_node.errors import CheckpointError, DiskFull, LocalError

PREFIX = "hf:"
WANTED = ["config.json", "generation_config.json", "tokenizer*.json", "*.jinja", "*.safetensors*"]
"""Weights only as safetensors, and no code: what else a repository holds is not fetched."""

_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def fetch_hub(repo: str, *, endpoint: str | None = None, cache_dir: Path | None = None) -> Path:
    """Download a repository's checkpoint, or what is missing of it, into the hub's usual cache; return its directory.

    ``repo`` is ``ORGANISATION/NAME``; ``endpoint`` the hub, by default that of the environment (``HF_ENDPOINT``).
    An interrupted download goes on where it stopped. Raises CheckpointError for a repository that is not there or may
    not be read, LocalError where the hub cannot be reached, DiskFull.
    """
    if not _REPO.fullmatch(repo):
        raise CheckpointError(f"{repo!r:.200} names no repository: write hf:ORGANISATION/NAME")
    # A second to import, and needed for nothing else.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        found = snapshot_download(repo, allow_patterns=WANTED, endpoint=endpoint, cache_dir=cache_dir)
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"the hub has no public repository {repo}; a private one needs HF_TOKEN") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise LocalError(f"the hub did not give {repo}: {error}; check the network, then try again") from error
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise DiskFull(f"no space left to download {repo}: free some, or set HF_HOME to another disk") from error
        raise LocalError(
            f"the hub could not be reached for {repo}: {error}; check the network, then try again"
        ) from error
    return Path(found)
