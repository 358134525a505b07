"""The file of API keys, and what a key may use in a day."""

from __future__ import annotations

import json
import threading

import pytest

from blyan_node.api import keys
from blyan_node.api.errors import ApiError
from blyan_node.api.keys import KeyFile
from blyan_node.api.usage import DAY_S, SAVE_EVERY_S, Usage
from blyan_node.errors import LocalError, RequestError

NOW = 1_800_000_000


def test_a_key_is_found_while_it_is_valid_and_never_stored(tmp_path):
    path = tmp_path / "data" / "api-keys.json"
    made, secret = keys.create(path, "web", scopes=["read", "chat"], now=NOW, expires=NOW + 60)
    assert made.scopes == ("chat", "read")
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    file = KeyFile(path)
    assert file.find(secret, NOW) == made
    assert file.find(secret, NOW + 60) is None
    for wrong in (secret[:-1], secret + " ", "", "bly_", "\udcff", made.hash, made.id):
        assert file.find(wrong, NOW) is None


def test_a_running_node_heeds_what_another_process_changes(tmp_path):
    path = tmp_path / "api-keys.json"
    file = KeyFile(path)
    assert file.find("bly_x", NOW) is None
    _, first = keys.create(path, "first", scopes=["chat"], now=NOW)
    second, other = keys.create(path, "second", scopes=["chat"], now=NOW)
    assert file.find(first, NOW)
    keys.revoke(path, "first", now=NOW)
    assert file.find(first, NOW) is None
    assert file.find(other, NOW) == second
    path.unlink()
    assert file.find(other, NOW) is None


def test_a_file_that_cannot_be_trusted_gives_nobody_access(tmp_path, caplog):
    path = tmp_path / "api-keys.json"
    _, secret = keys.create(path, "web", scopes=["chat"], now=NOW)
    file = KeyFile(path)
    path.chmod(0o644)
    assert file.find(secret, NOW) is None
    assert file.find(secret, NOW) is None
    assert caplog.text.count("chmod 600") == 1
    path.chmod(0o600)
    assert file.find(secret, NOW)
    good = json.loads(path.read_text())
    entry = good["keys"][0]
    for damaged in (
        "",
        "[]",
        "[" * 100_000,
        '{"keys": [{}]}',
        '{"keys": 5}',
        json.dumps({"keys": [entry | {"hash": 5}]}),
        json.dumps({"keys": [entry | {"expires": "never"}]}),
        json.dumps({"keys": [entry | {"scopes": [1]}]}),
        json.dumps({"keys": [entry | {"more": 1}]}),
    ):
        path.write_text(damaged)
        with pytest.raises(LocalError, match="damaged"):
            keys.load(path)
        assert file.find(secret, NOW) is None


def test_what_cannot_be_made_or_revoked(tmp_path):
    path = tmp_path / "api-keys.json"
    keys.create(path, "web", scopes=["chat"], now=NOW)
    for name, scopes, expires in (
        ("web", ["chat"], None),
        ("", ["chat"], None),
        ("x\n", ["chat"], None),
        ("x" * 65, ["chat"], None),
        ("x", ["king"], None),
        ("x", [], None),
        ("x", ["chat"], NOW),
    ):
        with pytest.raises(RequestError):
            keys.create(path, name, scopes=scopes, now=NOW, expires=expires)
    assert len(keys.load(path)) == 1
    with pytest.raises(RequestError, match="no key 'absent'"):
        keys.revoke(path, "absent", now=NOW)
    keys.revoke(path, "web", now=NOW)
    with pytest.raises(RequestError):
        keys.revoke(path, "web", now=NOW)
    assert keys.create(path, "web", scopes=["chat"], now=NOW)  # the name is free again


def test_commands_at_once_lose_nothing(tmp_path):
    path = tmp_path / "api-keys.json"
    threads = [
        threading.Thread(target=lambda name=f"k{number}": keys.create(path, name, scopes=["chat"], now=NOW))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in keys.load(path)} == {f"k{number}" for number in range(8)}


def test_a_day_of_tokens(tmp_path):
    key, _ = keys.create(tmp_path / "api-keys.json", "web", scopes=["chat"], now=NOW, tokens_per_day=10)
    free, _ = keys.create(tmp_path / "api-keys.json", "free", scopes=["chat"], now=NOW)
    path, morning = tmp_path / "usage.json", 20_000 * DAY_S + 0.0
    usage = Usage(path)
    usage.check(key, morning)
    usage.charge(key, 9, morning)
    usage.charge(free, 10**9, morning)
    usage.check(key, morning)
    usage.charge(key, 1, morning + SAVE_EVERY_S)
    usage.check(free, morning)
    for counts in (usage, Usage(path)):  # as it stands, and as it is read back after kill -9
        with pytest.raises(ApiError, match="used up") as refused:
            counts.check(key, morning + DAY_S - 10)
        assert (refused.value.status, refused.value.code) == (429, "insufficient_quota")
        assert refused.value.retry_after == 10
    usage.check(key, morning + DAY_S)


def test_usage_that_cannot_be_read_or_written_stops_nothing(tmp_path, caplog):
    key, _ = keys.create(tmp_path / "api-keys.json", "web", scopes=["chat"], now=NOW, tokens_per_day=10)
    for damaged in ("", "[]", '{"day": 1}', '{"day": 1, "used": 5}', '{"day": "x", "used": {}}'):
        (tmp_path / "usage.json").write_text(damaged)
        Usage(tmp_path / "usage.json").check(key, NOW)
    Usage(tmp_path / "absent" / "usage.json").charge(key, 5, NOW)
    assert "not saved" in caplog.text
