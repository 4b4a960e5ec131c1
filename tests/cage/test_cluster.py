"""Cluster files: what they say, and what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.cage.amounts import CORES, DISK_RATE, LINK_RATE, SIZE, Kind, parse
from prima_core.cage.cluster import Cluster, Node, load_cluster, parse_cluster, shipped
from prima_core.cage.limits import (
    LEAST_LIMIT_BYTES,
    Limits,
    Machine,
    Place,
    Workload,
    filled,
    limits_of,
    wants_disk_rate,
)
from prima_core.errors import ConfigError

MODEL_BYTES = 4_900_000_000
MACHINE = Machine(MODEL_BYTES, 1.5e9, 4)


def one(fields: str) -> Node:
    return parse_cluster(f'name = "x"\n[[nodes]]\nname = "a"\n{fields}').nodes[0]


# ---------------------------------------------------------------- amounts


@pytest.mark.parametrize(
    ("text", "kind", "reference", "value"),
    [
        ("512MB", SIZE, 0, 512e6),
        ("1.5 GiB", SIZE, 0, 1.5 * 2**30),
        (1000, SIZE, 0, 1000),
        ("20% of model", SIZE, 1e9, 2e8),
        ("20% of model - 150MB", SIZE, 1e9, 5e7),
        ("10MB + 1% of model + 1kB", SIZE, 1e9, 20_001_000),
        ("500MB/s", DISK_RATE, 0, 5e8),
        ("12.5 % of disk", DISK_RATE, 8e9, 1e9),
        ("320Mbit/s", LINK_RATE, 0, 320e6),
        (2.5, CORES, 0, 2.5),
        ("50% of machine", CORES, 4, 2),
    ],
)
def test_an_amount_is_read(text: str | float, kind: Kind, reference: float, value: float) -> None:
    assert parse(text, kind).of(reference) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", SIZE),
        ("much", SIZE),
        ("5 apples", SIZE),
        ("20% of disk", SIZE),
        ("20%", SIZE),
        ("1GB 2GB", SIZE),
        ("1GB -", SIZE),
        ("-1GB", SIZE),
        ("1e9", SIZE),
        ("500MB", DISK_RATE),
        ("10% of network", LINK_RATE),
        ("inf", CORES),
    ],
)
def test_what_is_no_amount_is_told_with_an_example(text: str, kind: Kind) -> None:
    with pytest.raises(ValueError, match="is not understood, write it like"):
        parse(text, kind)


# ---------------------------------------------------------------- files


def test_the_clusters_that_come_with_prima_hold_what_they_promise() -> None:
    assert shipped() == ("four-disks", "four-equal", "paper")
    equal = [limits_of(node, MACHINE) for node in load_cluster("four-equal").nodes]
    assert sum(limits.memory_bytes for limits in equal) == pytest.approx(0.8 * MODEL_BYTES, rel=1e-6)
    assert len(equal) == 4
    assert len({limits.memory_bytes for limits in equal}) == 1
    assert [limits.memory_bytes - limits.budget_bytes for limits in equal] == [150_000_000] + 3 * [100_000_000]
    disks = [limits_of(node, MACHINE) for node in load_cluster("four-disks").nodes]
    assert [replace(one, disk_bytes_s=None) for one in disks] == equal
    assert sum(one.disk_bytes_s or 0 for one in disks) == MACHINE.disk_bytes_s


def test_the_home_of_the_paper_is_scaled_to_model_and_disk() -> None:
    cluster = load_cluster("paper")
    limits = [limits_of(node, MACHINE) for node in cluster.nodes]
    assert [node.name for node in cluster.nodes] == ["d1", "d2", "d3", "d4"]
    memory_gib = sum((2.4, 4.1 + 8, 9.7 + 11, 1.9))
    assert sum(one.budget_bytes for one in limits) == pytest.approx(memory_gib / 39.6 * MODEL_BYTES, rel=0.01)
    assert all(one.memory_bytes == one.budget_bytes + 200_000_000 for one in limits)
    assert wants_disk_rate(cluster)
    assert sum(one.disk_bytes_s or 0 for one in limits) == pytest.approx(1.5e9, rel=0.01)
    assert limits[0].cores == 2


def test_defaults_hold_for_nodes_that_say_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\n[defaults]\nmemory = "1GB"\ndelay_ms = 2\n'
        '[[nodes]]\nname = "a"\n[[nodes]]\nname = "b"\nmemory = "2GB"\n'
    )
    cluster = load_cluster(str(file))
    assert [(node.memory, node.delay_ms) for node in cluster.nodes] == [("1GB", 2), ("2GB", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing required field `name`"),
        ('name = "x"', "missing required field `nodes`"),
        ('name = "x"\nnodes = 3', "Expected `array`"),
        ('name = "x"\nnodes = []', "length >= 1"),
        ('name = "x"\nnodes = [3]', r"Expected `object`, got `int` - at `\$.nodes"),
        ('name = "x"\ndefaults = 3\nnodes = [{name = "a", memory = "1GB"}]', "unknown field `defaults`"),
        ('name = "X Y"\nnodes = [{name = "a", memory = "1GB"}]', "matching regex"),
        ('name = "x"\nnodes = [{name = "a"}]', "missing required field `memory`"),
        ('name = "x"\nnodes = [{name = "a", memory = "1GB", cpu = 3}]', "unknown field `cpu`"),
        ('name = "x"\nnodes = [{name = "a", memory = "lots"}]', "memory: 'lots' is not understood"),
        ('name = "x"\nnodes = [{name = "a", memory = -5}]', ">= 0.0"),
        ('name = "x"\nnodes = [{name = "a", memory = "1GB", period_ms = 0}]', ">= 1.0"),
        ('name = "x"\nnodes = [{name = "a", memory = "1GB", ready = "("}]', r"ready: '\(' is not a regular expression"),
        (
            'name = "x"\nnodes = [{name = "a", memory = 1, command = ["x", "{modl}"]}]',
            r"command: \{modl\} is not known",
        ),
        ('name = "x"\nnodes = [{name = "a", memory = 1}, {name = "a", memory = 1}]', "two nodes are called 'a'"),
        ('name = "x"\nnodes = [{name = "a", memory = 1, command = ["x"]}]', "say in \\[measure\\] how its speed"),
        (
            'name = "x"\nnodes = [{name = "a", memory = 1, command = ["x"], options = ["-v"]}]',
            "options are prima's",
        ),
        ('name = "x"\nmeasure = {ms_per_token = "x"}\nnodes = [{name = "a", memory = 1}]', "has one group"),
        ('name = "x"\nmeasure = {begin = "x"}\nnodes = [{name = "a", memory = 1}]', "for a head with a command"),
        ('name = "x"\nmeasure = {url = "http://example.com/v1"}\nnodes = [{name = "a", memory = 1}]', "matching regex"),
        (
            'name = "x"\nmeasure = {url = "http://127.0.0.1:80", ms_per_token = "(x)"}\nnodes = [{name="a", memory=1}]',
            "exclude each other",
        ),
        ("name = ", "Invalid value"),
    ],
)
def test_what_is_no_cluster_is_told_with_the_culprit(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_cluster(text, "mine.toml")
    assert error.value.message.startswith("mine.toml: ")


@pytest.mark.parametrize("content", [None, b"\xff"], ids=["none", "binary"])
def test_a_file_that_cannot_be_read_is_told_with_the_clusters_there_are(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read the cluster .*mine.toml.*four-disks, four-equal, paper"):
        load_cluster(str(tmp_path / "mine.toml"))


# ---------------------------------------------------------------- limits and commands


def test_all_limits_of_a_node_come_from_its_fields() -> None:
    node = one('memory = "1GB"\nvram = "2GB"\nbase = "100MB"\ncores = "50% of machine"\nperiod_ms = 20\n'
               'disk = "10% of disk"\nlink = "1Gbit/s"\ndelay_ms = 1.5')  # fmt: skip
    assert limits_of(node, MACHINE) == Limits(
        memory_bytes=3_100_000_000,
        budget_bytes=3_000_000_000,
        cores=2.0,
        period_us=20_000,
        disk_bytes_s=150_000_000,
        link_bits_s=1_000_000_000,
        delay_s=0.0015,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('memory = "1% of model - 100MB"', "node a would have -51 MB"),
        (f"memory = {LEAST_LIMIT_BYTES - 1}", "no process lives there"),
        ('memory = "1GB"\ncores = 0', "node a: cores comes to 0"),
        ('memory = "1GB"\ndisk = "1kB/s"', "node a: disk comes to 1000"),
        ('memory = "1GB"\nlink = "1kbit/s"', "node a: link comes to 1000"),
    ],
)
def test_figures_that_no_process_can_live_with_are_refused(fields: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limits_of(one(fields), MACHINE)


def test_a_command_is_filled_in_for_its_node() -> None:
    parts = [
        "{name}:{rank}/{world}", "{address}", "{head}", "{next}", "{peers}", "-t{threads}", "{memory}", "{model}",
        "{prompt}+{gen}", '{"json": {}}',
    ]  # fmt: skip
    node = Node(name="c", memory=60_000_000, threads=3, command=tuple(parts))
    place = Place(2, ("10.0.0.1", "10.0.0.2", "10.0.0.3"))
    limits = limits_of(node, MACHINE)
    assert filled(node, place, limits, Path("m.gguf"), Workload(7, 8)) == [
        "c:2/3", "10.0.0.3", "10.0.0.1", "10.0.0.1", "10.0.0.1,10.0.0.2", "-t3", "60000000", "m.gguf", "7+8",
        '{"json": {}}',
    ]  # fmt: skip


def test_a_cluster_is_only_data() -> None:
    cluster = load_cluster("paper")
    assert isinstance(cluster, Cluster)
    assert hash(cluster) == hash(load_cluster("paper"))
