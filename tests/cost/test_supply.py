"""How fast images reach the GPUs: the slowest part counts, and more of anything is never slower."""

import math
import random
import re
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import pytest

from tests.conftest import ROOT
from vitcomposer import config
from vitcomposer.cost.inputs import Input, changes, measured_inputs
from vitcomposer.cost.supply import Demand, Feed, Machines, hours, hours_to_fill_cache, limits, stays_cached
from vitcomposer.schema import Data
from vitcomposer.shipped import RESULTS

STAGES = [Demand(1_000_000, 50_000.0, 96**2), Demand(500_000, 9_000.0, 224**2)]
ONE_SIZE = Input(kind="ours-ra", label="x", source="y", rates={224**2: 400.0}, bytes_per_image=1e5)
FEED = Feed(
    given=ONE_SIZE,
    plain=ONE_SIZE,
    has_column=None,
    known={},
    machines=Machines(),
    bytes_per_image=1e5,
    bytes_from="z",
    images=100_000,
    cached=False,
)
RATES = {"ours-ra": 400.0, "ours-seekable": 500.0, "ours-raw": 1200.0}
GPU_BOUND = sum(stage.images / stage.gpu_rate for stage in STAGES) / 3600


def fed(**machines: Any) -> Feed:
    return replace(FEED, machines=Machines(**machines))


def drawn(rng: random.Random) -> dict[str, Any]:
    """Machines of which anything may be little, much or unlimited."""
    found: dict[str, Any] = {name: 10 ** rng.uniform(6, 13) for name in ("disk", "network", "to_gpus")}
    found["cpus"] = math.ceil(10 ** rng.uniform(0, 6))
    return {name: None if rng.random() < 0.25 else value for name, value in found.items()}


@pytest.mark.parametrize("seed", range(100))
def test_more_of_anything_is_never_slower_and_never_faster_than_the_gpus(seed: int) -> None:
    rng = random.Random(seed)
    has, cached = drawn(rng), rng.random() < 0.5
    now = hours(STAGES, replace(fed(**has), cached=cached))
    assert now >= GPU_BOUND * (1 - 1e-12)
    for name, value in has.items():
        if value is not None:
            for more in (math.ceil(value * rng.uniform(1, 100)), None):
                assert hours(STAGES, replace(fed(**{**has, name: more}), cached=cached)) <= now * (1 + 1e-12)


def test_without_limits_the_gpus_are_the_limit() -> None:
    assert hours(STAGES, FEED) == hours(STAGES, fed(cpus=10**9)) == pytest.approx(GPU_BOUND)


def test_each_part_is_its_bytes_or_its_cores() -> None:
    found = limits(9_000.0, 224**2, fed(cpus=10, disk=2e8, network=1e8, to_gpus=1.505e9))
    expected = {"GPU": 9_000, "decode": 4_000, "disk": 2_000, "network": 1_000, "PCIe": 9_998}
    assert found == pytest.approx(expected, rel=1e-3)


def test_cpu_seconds_between_measured_sizes_are_linear_in_the_pixels() -> None:
    two = replace(ONE_SIZE, rates={10_000: 1000.0, 50_000: 250.0})
    assert two.seconds(30_000) == pytest.approx((0.001 + 0.004) / 2)
    assert two.seconds(10) == two.seconds(10_000) == 0.001
    assert two.seconds(100_000) == pytest.approx(0.008)


def test_a_cache_is_filled_once_and_a_file_server_is_read_in_every_epoch() -> None:
    every = fed(network=1e8)
    once = replace(every, cached=True)
    assert "network" in limits(1.0, 1, every) and "network" not in limits(1.0, 1, once)
    # 100,000 images of 100 kB over 0.1 GB/s take 100 s; training on them takes 2.
    assert hours_to_fill_cache(STAGES, once) == pytest.approx((100 - 2) / 3600)
    assert hours(STAGES, once) == pytest.approx(GPU_BOUND + 98 / 3600)
    assert hours(STAGES, every) == pytest.approx(1_500 / 3600)


@pytest.mark.parametrize(
    ("remote", "limit", "size", "stays"),
    [
        (None, None, 1e9, False),
        ("s3://a/b", None, 1e15, True),
        ("s3://a/b", "200gb", 150e9, True),
        ("s3://a/b", "200gb", 250e9, False),
        ("s3://a/b", "1000", 1e4, False),
        ("s3://a/b", "1.5 tb", 1.6e12, True),
    ],
)
def test_what_comes_from_a_bucket_stays_where_it_fits(
    remote: str | None, limit: str | None, size: float, stays: bool
) -> None:
    assert stays_cached(Data(remote=remote, local="x", cache_limit=limit), size) is stays


def test_changes_are_scaled_to_the_machine_that_bench_measured() -> None:
    """At each of its sizes: a machine of twice the speed takes half of the CPU seconds, with the change too."""
    cfg: Any = config.load("vit_s_mild")
    known = {name: replace(ONE_SIZE, kind=name, rates={224**2: rate}) for name, rate in RATES.items()}
    own = replace(ONE_SIZE, rates={96**2: 1600.0, 224**2: 800.0}, source="here.json")
    (device,) = (change.given for change in changes(cfg, own, known) if "device" in change.what)
    assert device.seconds(224**2) == pytest.approx(1 / 800 * 400 / 500)
    assert device.seconds(96**2) == pytest.approx(1 / 1600 * 400 / 500)
    assert device.bytes_per_image == own.bytes_per_image


@pytest.mark.parametrize("recipe", ["vit_s_mild", "swav_deit_s"])
def test_measurements_that_plan_reads_are_in_a_wheel(recipe: str) -> None:
    cfg: Any = config.load(recipe)
    read = {one.source for one in measured_inputs(RESULTS, cfg).values()}
    shipped = re.findall(r'"([\w*]+\.json)"', (ROOT / "setup.py").read_text())
    assert read and all(any(fnmatch(name, pattern) for pattern in shipped) for name in read)
