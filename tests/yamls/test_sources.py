"""What each yaml says against what its source says (``sources.yaml``), and its line ``Deviates:`` against both."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from vitcomposer import config

YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
TABLE = yaml.safe_load((ROOT / "tests/yamls/sources.yaml").read_text())
# Whose settings are nobody's but this project's.
OWN = ("demo", "swav_demo", "finetune_photos", "photos_scratch", "cifar10_vit", "cifar10_convit")
NO_SOURCE = "these settings are this project's own."
# What decides nothing of a result, and what peak_lr, first_lr and last_lr say in the source's units.
NOT_COMPARED = (
    r"recipe|seed|(data|run|monitor|init|cache)\..*|teacher\.weights|.*\.global_batch_size"
    r"|optimizer\.lr.*|schedule\.alpha_[if]"
)


def leaves(page: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a page; an algorithm with its arguments and the options of an optimizer are one value."""
    found: dict[str, Any] = {}
    for name, value in page.items():
        key = f"{prefix}{name}"
        whole = key == "optimizer.options" or prefix == "algorithms."
        found |= leaves(value, f"{key}.") if isinstance(value, dict) and not whole else {key: value}
    return found


def stated(path: Path) -> dict[str, Any]:
    """The keys of a yaml that decide its result, with the learning rates that its block makes of them."""
    found = leaves(yaml.safe_load(path.read_text()))
    if found["precision"] == "auto":
        found["precision"] = "amp_bf16"  # on the GPUs that a paper's recipe is meant for
    cfg = config.load(path)
    if hasattr(cfg, "optimizer"):
        peak = cfg.optimizer.peak_lr(cfg.global_train_batch_size)
        found |= {"peak_lr": peak, "first_lr": cfg.schedule.alpha_i * peak, "last_lr": cfg.schedule.alpha_f * peak}
    skipped = NOT_COMPARED + (r"|evaluation\..*" if "crops.size_crops" in found else "")
    return {key: value for key, value in found.items() if not re.fullmatch(skipped, key)}


def source_of(name: str) -> tuple[dict[str, Any], list[str]]:
    """What the source of a yaml says: values by key, and what differs that no key says."""
    values: dict[str, Any] = {}
    other: list[str] = []
    for group in TABLE:
        if name in group["yamls"]:
            values |= leaves(group["values"])
            other += group.get("other", [])
    return values, other


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float | int) and isinstance(theirs, float | int) and not isinstance(ours, bool):
        return ours == pytest.approx(theirs, rel=2e-3, abs=1e-12)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    return ours == theirs


def deviations(path: Path) -> str:
    """The end of the line ``Deviates:`` of a yaml."""
    if path.stem in OWN:
        return NO_SOURCE
    ours, (theirs, other) = stated(path), source_of(path.stem)
    differ = [key for key in theirs if not equal(ours.get(key), theirs[key])]
    parts = [f"{key} is {_shown(theirs[key])} there" for key in differ] + other
    return "; ".join(parts) + "." if parts else "none."


def _shown(value: Any) -> str:
    if value is None:
        return "not"
    return yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).removesuffix("\n...\n").strip()


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_header_lists_every_deviation_from_the_source(path: Path) -> None:
    header = " ".join(re.findall(r"^# ?(.*)", path.read_text().partition("\nrecipe:")[0], re.M))
    found = re.search(
        r"Deviates: (.*?\.)(?= |$)(?=\s+(composer|curl|torchrun|vitcomposer) |$)", " ".join(header.split())
    )
    assert found is not None, f"add: # Deviates: {deviations(path)}"
    assert found[1] == deviations(path)


@pytest.mark.parametrize("path", [p for p in YAMLS if p.stem not in OWN], ids=lambda p: p.stem)
def test_every_value_of_a_yaml_has_a_source(path: Path) -> None:
    unknown = sorted(stated(path).keys() - source_of(path.stem)[0].keys())
    assert unknown == [], "add what the source says of it to tests/yamls/sources.yaml, null where it has no such thing"


def test_table_names_yamls_keys_and_sources_that_exist() -> None:
    names = {path.stem for path in YAMLS}
    known = {key for path in YAMLS for key in leaves(yaml.safe_load(path.read_text()))}
    known |= {"peak_lr", "first_lr", "last_lr", "model.num_heads", "model.drop_rate"}
    for group in TABLE:
        assert set(group["yamls"]) <= names - set(OWN)
        assert re.search(r"arXiv:\d{4}\.\d{5}|facebookresearch/|google-research/|LeapLabTHU/", group["source"])
        assert leaves(group["values"]).keys() <= known
    assert {name for group in TABLE for name in group["yamls"]} == names - set(OWN)


def test_a_changed_value_is_a_deviation_that_the_header_lacks(tmp_path: Path) -> None:
    """What these tests would miss would be worth nothing."""
    page = ROOT / "yamls/deit_s.yaml"
    for old, new, told in [
        ("random_erasing: 0.25", "random_erasing: 0.2", "augment.random_erasing is 0.25 there"),
        ("lr: 5.0e-4", "lr: 6.0e-4", "peak_lr is 0.001 there"),
        ("  EMA: {smoothing: 0.99996, update_interval: 1ba}", "  {}", "algorithms.EMA is {smoothing: 0.99996"),
    ]:
        assert old in page.read_text()
        changed = tmp_path / "deit_s.yaml"
        changed.write_text(page.read_text().replace(old, new))
        assert told in deviations(changed) and told not in deviations(page)
