from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.config import FIELDS, NodeConfig, load_config, parse_size, shown
from blyan_node.errors import ConfigError

PEER = "/ip4/10.0.0.1/tcp/4001/p2p/16Uiu2HAm"


def test_defaults_need_nothing() -> None:
    loaded = load_config({}, {})
    assert loaded.config == NodeConfig()
    assert set(loaded.sources.values()) == {"default"}
    assert loaded.config.api_host == "127.0.0.1"


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('api_port = 1\nthreads = 2\nmemory_limit = "4GiB"\nlog_level = "debug"\n')
    loaded = load_config(
        {"api_port": 3, "log_level": None}, {"BLYAN_API_PORT": "2", "BLYAN_THREADS": "5", "X": "y"}, file
    )
    assert (loaded.config.api_port, loaded.config.threads) == (3, 5)
    assert loaded.config.memory_limit == 4 * 2**30
    assert loaded.config.log_level == "debug"
    assert loaded.sources["api_port"] == "flag"
    assert loaded.sources["threads"] == "environment"
    assert loaded.sources["memory_limit"] == str(file)
    assert loaded.sources["device"] == "default"


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(f'bootstrap = ["{PEER}"]\n')
    assert load_config({}, {"BLYAN_CONFIG": str(file)}).config.bootstrap == (PEER,)


def test_what_was_joined_gives_way_to_all_else(tmp_path: Path) -> None:
    other = PEER.replace("10.0.0.1", "10.0.0.2")
    joined = tmp_path / "network.toml"
    joined.write_text(f'network = "{"a1" * 32}"\nbootstrap = ["{PEER}"]\ncheckpoint = "12:{"b2" * 32}"\n')
    at = {"data_dir": str(tmp_path)}
    loaded = load_config(at, {})
    assert (loaded.config.network, loaded.config.bootstrap) == ("a1" * 32, (PEER,))
    assert loaded.config.checkpoint == f"12:{'b2' * 32}"
    assert loaded.sources["bootstrap"] == str(joined)
    assert load_config(at, {"BLYAN_BOOTSTRAP": other}).config.bootstrap == (other,)
    assert load_config({}, {"BLYAN_DATA_DIR": str(tmp_path)}).config.bootstrap == (PEER,)
    assert load_config({**at, "bootstrap": [other]}, {}).sources["bootstrap"] == "flag"
    file = tmp_path / "node.toml"
    file.write_text(f'bootstrap = ["{other}"]\n')
    assert load_config(at, {}, file).config.bootstrap == (other,)
    assert load_config({"data_dir": str(joined)}, {}).config.bootstrap == ()  # not a directory: start says so


@pytest.mark.parametrize(
    ("toml", "told"),
    [('network = "a1"', "id of a network"), ('checkpoint = "12"', "a final cut"), ("x = 1", "unknown setting x")],
)
def test_a_damaged_file_of_the_joined_network_is_named(tmp_path: Path, toml: str, told: str) -> None:
    (tmp_path / "network.toml").write_text(toml)
    with pytest.raises(ConfigError, match=rf"network\.toml.*{told}|{told}.*network\.toml"):
        load_config({"data_dir": str(tmp_path)}, {})


def test_forms() -> None:
    environ = {
        "BLYAN_ENV": "test",
        "BLYAN_TEST_MODE": "true",
        "SKIP_DB_INIT": "true",
        "BLYAN_CACHE_DIR": "/x",
        "BLYAN_GENESIS": "",
        "BLYAN_BOOTSTRAP": f"{PEER}, {PEER}",
        "BLYAN_DATA_DIR": "~/here",
    }
    config = load_config({"announce": ["/dns4/a.example/tcp/1"]}, environ).config
    assert (config.env, config.test_mode) == ("test", True)
    assert config.bootstrap == (PEER, PEER)
    assert config.announce == ("/dns4/a.example/tcp/1",)
    assert config.data_dir == Path.home() / "here"
    assert config.genesis is None


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("bogus = 1", "unknown setting bogus"),
        ('api_port = "8645"', "whole number from 0 to 65535"),
        ("api_port = true", "api_port"),
        ("api_port = 70000", "0 to 65535"),
        ("listen = 5", "multiaddr"),
        ('listen = ["/ip4/0.0.0.0/tcp/1"]', "multiaddr"),
        ('bootstrap = ["/ip4/1.2.3.4/tcp/1"]', "with a peer id"),
        ("bootstrap = [5]", "with a peer id"),
        ('log_level = "loud"', "debug, info, warning, error"),
        ('memory_limit = "lots"', "4GiB"),
        ('test_mode = "true"', "true or false"),
        ("dtype = 16", "float32"),
        ("[p2p]\nx = 1", "unknown setting p2p"),
        ("= 1", "not valid TOML"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, toml: str, told: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError) as caught:
        load_config({}, {}, file)
    assert told in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"BLYAN_API_PRT": "1"}, "unknown setting BLYAN_API_PRT"),
        ({"BLYAN_API_PORT": "x"}, "BLYAN_API_PORT = 'x' (environment)"),
        ({"BLYAN_TEST_MODE": "yes"}, "true or false"),
        ({"BLYAN_DEVICE": "tpu"}, "cuda"),
        ({"BLYAN_CONFIG": "/does/not/exist.toml"}, "No such file"),
    ],
)
def test_the_environment_is_checked_too(environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, environ)
    assert told in str(caught.value)


def test_flags_are_named_as_they_are_written() -> None:
    with pytest.raises(ConfigError, match="--memory-limit = 'x' cannot be used"):
        load_config({"memory_limit": "x"}, {})


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512MiB", 512 * 2**20), ("4 GB", 4 * 10**9), ("1.5KiB", 1536), (7, 7), ("2TB", 2 * 10**12), ("9B", 9)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=12))
def test_sizes_are_positive_or_refused(text: str) -> None:
    try:
        assert parse_size(text) > 0
    except ValueError:
        pass


def test_every_setting_is_described_and_shown() -> None:
    config = NodeConfig()
    for name, field in FIELDS.items():
        assert field.metadata["meaning"]
        assert shown(getattr(config, name))


def test_who_may_sign_in() -> None:
    assert load_config({}, {}).config.wallets == ("any",)
    loaded = load_config({}, {"BLYAN_WALLETS": "none", "BLYAN_API_SITE": "https://node.example"}).config
    assert (loaded.wallets, loaded.api_site) == (("none",), "https://node.example")
    for name, wrong in (("WALLETS", "0x12"), ("API_SITE", "https://node.example/"), ("API_SITE", "node.example")):
        with pytest.raises(ConfigError):
            load_config({}, {f"BLYAN_{name}": wrong})
