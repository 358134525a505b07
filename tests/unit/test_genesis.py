from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.chain.genesis import (
    DEVNET,
    MAX_BALANCES,
    MAX_BARRED,
    MAX_VALIDATORS,
    Genesis,
    Restart,
    Validator,
    load_genesis,
    parse_genesis,
)
from blyan_node.chain.presets import PRESETS, load_preset
from blyan_node.chain.records import MAX_MONEY
from blyan_node.codec import encode, to_value
from blyan_node.errors import ConfigError
from blyan_node.relay.genesis import MAX_GENESIS
from tests.support.chains import GENESIS, KEYS

TEXT = """
format = 2
name = "devnet"
created_ms = 1700000000000

[parameters]
cap = 1000000000000000000
epoch = 10
unbonding = 100
min_stake = 1
slash_millionths = 50000
faucet_per_record = 1000000000000
faucet_per_cut = 10000000000000
fee_per_byte = 0

[[validators]]
address = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
stake = 5
"""
RESTART = f"""
[restart]
network = "{"a1" * 32}"
k = 12
cut = "{"b2" * 32}"
state_root = "{"c3" * 32}"
barred = ["0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359"]

[[restart.validators]]
address = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
stake = 7

[[signatures]]
address = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
signature = "{"d4" * 65}"
"""
VALIDATOR = TEXT[TEXT.index("[[") :]
POOR = '[[balances]]\naddress = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"\namount = 0\n'


@given(
    st.text(min_size=1, max_size=16),
    st.dictionaries(st.binary(min_size=20, max_size=20), st.integers(1, 10**15), min_size=1, max_size=5),
    st.integers(0, 2**62),
)
def test_a_genesis_survives_its_file(name, stakes, created_ms):
    genesis = Genesis.make(name, stakes, created_ms=created_ms)
    again = parse_genesis(genesis.to_toml())
    assert again == genesis
    assert again.network == genesis.network
    assert Genesis.make(name, dict(reversed(stakes.items())), created_ms=created_ms).network == genesis.network


def test_the_network_is_the_hash_of_the_canonical_form(tmp_path):
    validators = [[key.address, 10] for key in sorted(KEYS, key=lambda key: key.address)]
    assert (
        GENESIS.network
        == hashlib.sha256(encode([2, b"test", 1_700_000_000_000, to_value(DEVNET), validators, [], None])).digest()
    )
    GENESIS.save(tmp_path / "genesis.toml")
    assert load_genesis(tmp_path / "genesis.toml") == GENESIS
    assert GENESIS.bonded == {key.address for key in KEYS}


def test_every_part_makes_another_network():
    stakes = {KEYS[0].address: 1}
    networks = {
        Genesis.make("a", stakes, created_ms=0).network,
        Genesis.make("b", stakes, created_ms=0).network,
        Genesis.make("a", stakes, created_ms=1).network,
        Genesis.make("a", {KEYS[0].address: 2}, created_ms=0).network,
        Genesis.make("a", {KEYS[1].address: 1}, created_ms=0).network,
    }
    assert len(networks) == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 2", "format = 3", "format 3 is not known"),
        ("format = 2", "", "format is missing"),
        ("format = 2", "format = 2\nextra = 2", "unknown names: extra"),
        ("stake = 5", "stake = 5\nweight = 1", "an entry of validators has unknown names: weight"),
        ("stake = 5", "stake = 0", "not a usable genesis"),
        ("stake = 5", "stake = -1", "not a usable genesis"),
        ("stake = 5", "stake = 5.0", "stake takes int"),
        ("stake = 5", "stake = true", "stake takes int"),
        ("stake = 5", "", "stake is missing"),
        ("stake = 5", f"stake = {MAX_MONEY + 1}", "not a usable genesis"),
        ("0x5aAeb", "0x5AAeb", "checksum"),
        ("0x5aAeb", "x5aAeb", "is not an address"),
        ("[parameters]", "[unknown]", "unknown names: unknown"),
        ("epoch = 10", "epoch = 0", "not a usable genesis"),
        ("epoch = 10", "epoch = 99", "nothing at stake"),
        ("epoch = 10", "epochs = 10", "unknown names: epochs"),
        ("cap = 1000000000000000000", "cap = 4", "hands out 5"),
        ("min_stake = 1", "min_stake = 6", "less than the least stake"),
        ("[[validators]]", f"{POOR}\n[[validators]]", "not a usable"),
        ('"devnet"', "7", "name takes str"),
        ('"devnet"', '""', "not a usable genesis"),
        ("1700000000000", "-1", "not a usable genesis"),
        ("[[validators]]", "[[others]]", "unknown names: others"),
        ("[[validators]]", "[validators]", "validators takes list"),
        ("name =", "name", "not TOML"),
        ("stake = 5", 'stake = 5\n[[validators]]\naddress = "0x5aaeb6053f3e94c9b9a09f33669435e7ef1beaed"', "twice"),
        (VALIDATOR, "[[validators]]", "address is missing"),
        (VALIDATOR, "", "validators is missing"),
        ("[parameters]", "validators = []\n[parameters]", "not TOML"),
    ],
)
def test_a_faulty_file_is_refused_by_name(tmp_path, old, new, message):
    path = tmp_path / "genesis.toml"
    path.write_text(TEXT)
    assert load_genesis(path).name == "devnet"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError, match=f"genesis.toml.*{message}"):
        load_genesis(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[restart]", "[restart]\nheight = 1", "restart has unknown names: height"),
        ("k = 12", "", "k is missing"),
        ("k = 12", "k = -1", "not a usable genesis"),
        ('"' + "b2" * 32, '"' + "b2" * 31, "not a usable genesis"),
        ('"' + "a1" * 32, '"0x' + "a1" * 32, "restart.network takes hex digits"),
        ('state_root = "', "state_root = 7 # ", "state_root takes str"),
        ("0xfB69", "0xfb69", "checksum"),
        ('barred = ["', 'barred = [5, "', "'5' is not an address"),
        ("barred = [", 'barred = "" # [', "barred takes list"),
        ("stake = 7", "stake = 0", "not a usable genesis"),
        (RESTART[RESTART.index("[[restart") : RESTART.index("[[sig")], "", "validators is missing"),
        ("[[restart.validators]]", "[restart.validators]", "validators takes list"),
        ("d4" * 65, "d4" * 64, "not a usable genesis"),
        ("d4" * 65, "dy" * 65, "signature takes hex digits"),
        ("[[signatures]]", "[signatures]", "signatures takes tables"),
        ("signature =", "proof =", "an entry of signatures has unknown names: proof"),
        (RESTART[: RESTART.index("[[sig")], "", "signatures without a restart"),
        ("[[signatures]]", RESTART[RESTART.index("[[sig") :] + "[[signatures]]", "twice in signatures"),
    ],
)
def test_a_faulty_restart_is_refused_by_name(old, new, message):
    genesis = parse_genesis(TEXT + RESTART)
    assert genesis.restart.barred == (bytes.fromhex("fb6916095ca1df60bb79ce92ce3ea74c37c5d359"),)
    assert genesis.signatures[0].signature == b"\xd4" * 65
    assert old in RESTART
    with pytest.raises(ConfigError, match=message):
        parse_genesis(TEXT + RESTART.replace(old, new, 1))


def test_every_part_of_a_restart_makes_another_network_and_signatures_do_not():
    plain, restarted = parse_genesis(TEXT), parse_genesis(TEXT + RESTART)
    networks = {plain.network, restarted.network}
    for old, new in [("a1" * 32, "a2" * 32), ("12", "13"), ("b2" * 32, "b3" * 32), ("c3" * 32, "c4" * 32)]:
        networks.add(parse_genesis(TEXT + RESTART.replace(old, new)).network)
    networks.add(parse_genesis(TEXT + RESTART.replace("= 7", "= 8")).network)
    networks.add(parse_genesis(TEXT + RESTART.replace('"0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359"', "")).network)
    assert len(networks) == 8
    other = parse_genesis(TEXT + RESTART.replace("d4" * 65, "d5" * 65))
    assert (other, other.network) == (restarted, restarted.network)


def test_the_largest_genesis_fits_into_an_answer_and_a_larger_one_says_why_not():
    def addresses(count: int) -> list[bytes]:
        return [number.to_bytes(20) for number in range(count)]

    validators = tuple(Validator(address, MAX_MONEY) for address in addresses(MAX_VALIDATORS))
    restart = Restart(bytes(32), 2**63 - 1, bytes(32), bytes(32), validators, tuple(addresses(MAX_BARRED)))
    small = Genesis.make(
        "n" * 64,
        dict.fromkeys(addresses(MAX_VALIDATORS), 1),
        created_ms=2**63 - 1,
        balances=dict.fromkeys(addresses(MAX_BALANCES), 1),
        restart=restart,
        signatures=dict.fromkeys(addresses(MAX_VALIDATORS), bytes(65)),
    )
    digits = len(str(MAX_MONEY)) * (MAX_VALIDATORS + MAX_BALANCES)  # more than money that adds up can take
    assert len(small.to_toml().encode()) + 10 * 64 + digits < MAX_GENESIS
    with pytest.raises(ConfigError, match=f"at most {MAX_BALANCES} balances, not {MAX_BALANCES + 1}"):
        Genesis.make("n", {KEYS[0].address: 1}, created_ms=0, balances=dict.fromkeys(addresses(MAX_BALANCES + 1), 1))


def test_the_presets():
    parameters = {name: load_preset(name) for name in PRESETS}
    assert parameters["devnet"] == DEVNET
    assert {each.cap for each in parameters.values()} == {MAX_MONEY}
    assert [bool(parameters[name].faucet_per_record) for name in ("mainnet", "testnet", "devnet")] == [0, 1, 1]
    for each in parameters.values():
        # Who owns nothing yet can pay no fee, so it could not ask the faucet.
        assert not (each.faucet_per_cut and each.fee_per_byte)
        assert each.faucet_per_record <= each.faucet_per_cut


@pytest.mark.parametrize("name", ["devnet", "testnet"])
def test_the_example_files(name):
    genesis = load_genesis(Path(__file__).parents[2] / "configs" / f"genesis-{name}.toml")
    assert (genesis.name, genesis.parameters) == (f"example-{name}", load_preset(name))


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_genesis(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_genesis(tmp_path / "binary")


def test_stakes_are_bounded_in_sum():
    with pytest.raises(ConfigError, match="hands out"):
        Genesis.make("rich", {key.address: MAX_MONEY for key in KEYS[:2]}, created_ms=0)
