"""API keys as the operator makes them."""

from __future__ import annotations

import time

import pytest

from blyan_node.api.keys import KeyFile
from blyan_node.cli.key import _moment
from blyan_node.errors import ConfigError
from tests.support.commands import invoke


def test_a_key_from_its_making_to_its_end(tmp_path):
    made = invoke("key", "create", "web", "--scope", "chat", "--scope", "read", data_dir=tmp_path)
    assert made.code == 0, made.err
    secret = made.out.strip()
    assert "not shown again" in made.err
    file = KeyFile(tmp_path / "api-keys.json")
    assert file.find(secret, time.time()).scopes == ("chat", "read")
    (listed,) = invoke("key", "list", "--json", data_dir=tmp_path).json
    assert listed["id"] in made.err
    assert (listed["name"], listed["state"], "hash" in listed) == ("web", "valid", False)
    assert invoke("key", "list", data_dir=tmp_path).lines[1].split("\t")[-2:] == ["never", "valid"]
    gone = invoke("key", "revoke", "web", data_dir=tmp_path)
    assert gone.out == f"revoked {listed['id']} (web)\n"
    assert file.find(secret, time.time()) is None
    again = invoke("key", "revoke", "web", data_dir=tmp_path)
    assert (again.code, "key list" in again.err) == (1, True)


def test_as_json_with_bounds(tmp_path):
    done = invoke(
        "key", "create", "web", "--tokens-per-day", "500", "--expires", "2h", "--json", data_dir=tmp_path / "new"
    )
    assert done.json["key"].startswith("bly_")
    assert (done.json["scopes"], done.json["tokens_per_day"]) == (["chat"], 500)
    assert done.json["expires"] - done.json["created"] == 7200
    revoked = invoke("key", "revoke", done.json["id"], "--json", data_dir=tmp_path / "new")
    assert revoked.json["state"] == "revoked"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("web", "--scope", "king"), 2, "chat"),
        (("web", "--expires", "soon"), 2, "90d"),
        (("web", "--expires", "2001-01-01"), 1, "expired already"),
        (("web", "--tokens-per-day", "0"), 2, "tokens-per-day"),
        (("",), 1, "printable"),
    ],
)
def test_what_cannot_be_made(tmp_path, arguments, code, said):
    done = invoke("key", "create", *arguments, data_dir=tmp_path)
    assert done.code == code
    assert said in done.err
    assert not (tmp_path / "api-keys.json").exists()


def test_moments():
    assert _moment("30m", 100) == 1900
    assert _moment("1970-01-02", 100) == 86_400
    for wrong in ("", "5", "-1d", "1.5h", "1970-13-01", "9999999d"):
        with pytest.raises(ConfigError):
            _moment(wrong, 0)
