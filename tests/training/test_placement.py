"""Where RandAugment runs when a GPU trains: by what either place costs, once for a run, with the same pixels."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import ROOT, tiny_photo_overrides
from vitcomposer import config
from vitcomposer.cost import augmentation
from vitcomposer.cost.augmentation import Costs, is_better_on_device, measure_costs, seconds_in_step
from vitcomposer.data.batch import OP_CODES
from vitcomposer.data.loader import build_dataspec
from vitcomposer.runs.identity import write_identity
from vitcomposer.schema import Supervised
from vitcomposer.training import placement
from vitcomposer.training.setup import BatchShare

DEIT = str(ROOT / "yamls/deit_ti.yaml")
GPU = BatchShare(device="gpu", world_size=1, device_train_batch_size=16, device_eval_batch_size=16)
# A worker makes 1,000 images a second with RandAugment and 1,250 without; the device takes 20 ms for a batch.
COSTS = Costs(image_in_worker=1e-3, image_without=8e-4, batch_on_device=0.02)


@pytest.mark.parametrize(
    ("workers", "images_per_second", "better"),
    [
        (4, 20_000, True),  # 4,000 or 5,000 of the workers
        (4, 5_000, True),  # 5,000 of the workers, 4,184 of a GPU that augments too
        (4, 4_200, False),  # 4,200 or 3,609 of the GPU
        (4, 2_000, False),  # the workers keep up
        (16, 12_000, False),
        (0, 2_000, True),  # the main process loads
    ],
)
def test_the_device_is_chosen_where_a_step_ends_sooner(workers: int, images_per_second: float, better: bool) -> None:
    assert is_better_on_device(COSTS, batch=512, workers=workers, image_in_step=1 / images_per_second) is better


def test_a_small_batch_does_not_pay_for_the_launches() -> None:
    assert is_better_on_device(COSTS, batch=512, workers=4, image_in_step=1e-9)
    assert not is_better_on_device(COSTS, batch=32, workers=4, image_in_step=1e-9)


def test_a_step_is_that_of_the_plan() -> None:
    cfg: Supervised = config.load("deit_ti", ["precision=amp_bf16"])
    found = seconds_in_step(cfg, "NVIDIA H200")
    assert found is not None and 5_000 < 1 / found < 100_000
    assert (
        seconds_in_step(cfg, "cpu") is None and seconds_in_step(replace(cfg, precision="auto"), "NVIDIA H200") is None
    )


def loader(cfg: Supervised) -> Any:
    return build_dataspec(cfg, "train", seed=0, device_batch_size=16)


def load(photo_mds: Path, runs: Path, *more: str) -> Supervised:
    return config.load(DEIT, [*tiny_photo_overrides(photo_mds, runs, "placed"), *more])


def test_measuring_changes_nothing(photo_mds: Path, tmp_path: Path) -> None:
    cfg = load(photo_mds, tmp_path)
    spec, untouched = loader(cfg), loader(cfg)
    collate = spec.dataloader.collate_fn
    samples = [spec.dataloader.dataset[at] for at in range(0, 192, 6)]
    found = measure_costs(collate, samples, cfg.augment.mean, batch=40, device=torch.device("cpu"))
    assert min(found.image_in_worker, found.image_without, found.batch_on_device) > 0
    assert collate.augment_on_device is False
    first, same = next(iter(spec.dataloader)), next(iter(untouched.dataloader))
    assert torch.equal(first["image"], same["image"]) and torch.equal(first["sample_id"], same["sample_id"])


@pytest.mark.parametrize("images_per_second", [1e9, 1.0])
def test_a_run_with_a_gpu_chooses_once(
    images_per_second: float, photo_mds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cfg = load(photo_mds, tmp_path, "data.num_workers=2")
    monkeypatch.setattr(placement, "seconds_in_step", lambda *_: 1 / images_per_second)
    monkeypatch.setattr(augmentation, "seconds_of", lambda *_: 1e-9)  # of a GPU that augments in no time
    monkeypatch.setattr(augmentation, "_quickest", lambda call: (len(call()) == 0) + 64e-3)
    seen = []
    original = placement.is_better_on_device
    monkeypatch.setattr(placement, "is_better_on_device", lambda costs, **k: seen.append(k) or original(costs, **k))
    spec = loader(cfg)
    placed = placement.place_rand_augment(cfg, GPU, spec)
    assert seen == [{"batch": 16, "workers": 2, "image_in_step": 1 / images_per_second}]
    assert placed.data.augment_on == "worker", "both ways take a worker as long here"
    assert "data.augment_on=worker: 2 workers give 2,000 images/s with RandAugment" in capsys.readouterr().err

    monkeypatch.setattr(placement, "measure_costs", lambda *_, **__: COSTS)
    placed = placement.place_rand_augment(cfg, replace(GPU, device_train_batch_size=512), spec)
    fast = images_per_second > 1
    assert placed.data.augment_on == ("device" if fast else "worker")
    batch = next(iter(cast(DataLoader, spec.dataloader)))
    assert (OP_CODES in batch) is fast

    (tmp_path / "placed").mkdir()
    write_identity(tmp_path / "placed", {"config": {"data": {"augment_on": "device"}}})
    monkeypatch.setattr(placement, "measure_costs", None)  # a run that goes on measures nothing
    assert placement.place_rand_augment(cfg, GPU, spec).data.augment_on == "device"


@pytest.mark.parametrize("more", [["augment.rand_augment=null"], ["data.augment_on=worker"], []])
def test_others_are_left_as_they_are(
    more: list[str], photo_mds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, share = load(photo_mds, tmp_path, *more), GPU if more else replace(GPU, device="cpu")
    monkeypatch.setattr(placement, "_choose", None)
    assert placement.place_rand_augment(cfg, share, loader(cfg)) is cfg
