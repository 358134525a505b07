"""The parameters of the usual kinds of network: ``blyan_node/presets/*.toml``, where each is explained."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Literal, get_args

from blyan_node.chain.genesis import Parameters, read_parameters

Preset = Literal["devnet", "testnet", "mainnet"]
PRESETS: tuple[Preset, ...] = get_args(Preset)


def load_preset(name: Preset) -> Parameters:
    """Return the parameters of a kind of network."""
    text = (resources.files("blyan_node") / "presets" / f"{name}.toml").read_text("utf-8")
    return read_parameters(tomllib.loads(text)["parameters"])
