"""From the blocks of a yaml to batches: what a user gets wrong, synthetic data, and Composer's own resumption."""

import json
import os
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.models import ComposerModel
from composer.utils import reproducibility
from torch import nn
from torch.utils.data import DataLoader

from tests.data.mds.test_stream import NUM_CLASSES, NUM_SAMPLES, OPENED, end_workers, write_split
from vitcomposer.data import loader as loader_module
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.loader import build_dataspec
from vitcomposer.data.mds.stream import ImageStream
from vitcomposer.data.synthetic import SyntheticImages
from vitcomposer.errors import ConfigError
from vitcomposer.schema import Augment, Data, Evaluation, Mixing, Model, Optimizer, Run, Schedule, Supervised

pytestmark = pytest.mark.timeout(150)

NAMES = [f"class {index}" for index in range(NUM_CLASSES)]


def config(num_classes: int = NUM_CLASSES, repeats: int = 1, **data) -> Supervised:
    return Supervised(
        recipe="supervised",
        seed=0,
        max_duration="2ep",
        global_train_batch_size=8,
        precision="fp32",
        loss="soft_target_cross_entropy",
        model=Model(name="vit", num_classes=num_classes, image_size=16, drop_path_rate=0.0),
        data=Data(**{"num_workers": 0, **data}),
        augment=Augment(
            crop_scale=(0.5, 1.0),
            interpolation="bicubic",
            flip_prob=0.5,
            rand_augment=None,
            three_augment=False,
            color_jitter=0.0,
            random_erasing=0.25,
            repeated_augmentation=repeats,
        ),
        mixing=Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1),
        evaluation=Evaluation(crop_ratio=0.875, interpolation="bicubic"),
        optimizer=Optimizer(name="sgd", lr=0.1, lr_batch_size=8, lr_scaling="none", weight_decay=0.0),
        schedule=Schedule(t_warmup="0ep", alpha_i=0.0, alpha_f=0.0, cosine_from="start"),
        run=Run(name="test"),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", NUM_SAMPLES), ("val", 13)):
        write_split(tmp_path / split, count)
        (tmp_path / split / "class_names.json").write_text(json.dumps(NAMES))
    return tmp_path


def loader_of(spec) -> DataLoader:
    assert isinstance(spec.dataloader, DataLoader)
    OPENED.append(spec.dataloader)
    return spec.dataloader


@pytest.fixture(autouse=True)
def opened():
    yield
    end_workers()


@pytest.mark.parametrize("workers", [0, 2])
def test_train_batches_reach_the_model_as_images_and_soft_targets(root, workers):
    spec = build_dataspec(config(local=str(root), num_workers=workers), "train", seed=1, device_batch_size=8)
    batches = list(loader_of(spec))
    assert len(batches) == len(loader_of(spec)) == NUM_SAMPLES // 8
    assert spec.num_samples == NUM_SAMPLES
    for batch in batches:
        assert batch["image"].dtype == torch.uint8
        assert spec.get_num_samples_in_batch(batch) == 8
        for part in spec.split_batch(batch, 4):
            ready = spec.microbatch_transforms(part)
            assert (ready["image"].dtype, ready["image"].shape) == (torch.float32, (4, 3, 16, 16))
            torch.testing.assert_close(ready["target"].sum(1), torch.ones(4))


def test_batches_do_not_depend_on_the_workers(root):
    found = []
    for workers in (0, 1, 3, 4):
        cfg = config(local=str(root), num_workers=workers, repeats=3)
        loader = loader_of(build_dataspec(cfg, "train", seed=1, device_batch_size=8))
        found.append([batch for _ in range(2) for batch in loader])
    for batches in found[1:]:
        assert len(batches) == len(found[0])
        for batch, expected in zip(batches, found[0], strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_loader_has_the_workers_and_the_patience_of_the_block_data(root):
    given = {"local": str(root), "num_workers": 1, "prefetch_factor": 3, "timeout": 77.0}
    loader = loader_of(build_dataspec(config(**given), "train", seed=0, device_batch_size=8))
    assert (loader.num_workers, loader.prefetch_factor, loader.timeout) == (1, 3, 77.0)


def test_evaluation_batches_hold_every_sample_in_order(root):
    spec = build_dataspec(config(local=str(root), num_workers=2), "val", seed=1, device_batch_size=4)
    batches = list(loader_of(spec))
    assert len(batches) == len(loader_of(spec)) == 4
    assert torch.cat([batch["sample_id"] for batch in batches]).tolist() == list(range(13))
    assert spec.microbatch_transforms(batches[0])["image"].dtype == torch.float32


def test_synthetic_samples_are_those_of_a_data_set():
    cfg = config(source="synthetic", synthetic_samples=20, num_workers=2)
    spec = build_dataspec(cfg, "train", seed=1, device_batch_size=4)
    epochs = [torch.cat([batch["sample_id"] for batch in loader_of(spec)]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    alone = build_dataspec(config(source="synthetic", synthetic_samples=20), "train", seed=1, device_batch_size=4)
    assert torch.cat([batch["sample_id"] for batch in loader_of(alone)]).tolist() == epochs[0]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_synthetic_evaluation_is_shared_among_ranks(monkeypatch, rank):
    for name, value in {"WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    data = SyntheticImages(num_samples=10, num_classes=3, batch_size=2, shuffle=False, seed=0)
    samples = list(data)
    assert len(samples) == len(data) == 4
    counted = [sample["sample_id"] for sample in samples if sample["label"] != IGNORE_LABEL]
    assert counted == [i for i in range(10) if i % 3 == rank]


# What a user gets wrong


def test_a_wrong_class_count_names_the_key_and_the_file(root):
    message = f"model.num_classes must be 7, the number of classes in {root}/train/class_names.json, got 1000"
    with pytest.raises(ConfigError, match=f"{message}. Set model.num_classes=7."):
        build_dataspec(config(1000, local=str(root)), "train", seed=0, device_batch_size=8)


def test_splits_with_other_classes_are_refused(root):
    (root / "val" / "class_names.json").write_text(json.dumps([*NAMES[:2], "cat", *NAMES[3:]]))
    with pytest.raises(ConfigError, match="first difference is label 2, .*'cat'.* and .*'class 2'"):
        build_dataspec(config(local=str(root)), "val", seed=0, device_batch_size=8)


def test_a_data_set_smaller_than_a_batch_is_refused(root):
    with pytest.raises(ConfigError, match="global_train_batch_size must be at most 60, .*got 64"):
        build_dataspec(config(local=str(root)), "train", seed=0, device_batch_size=64)


def test_class_names_come_with_a_remote_data_set(root, tmp_path):
    cfg = config(5, remote=str(root), local=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="cache/train/class_names.json, got 5"):
        build_dataspec(cfg, "train", seed=0, device_batch_size=8)


# Shared memory


def test_blocks_of_a_killed_run_are_removed_and_those_of_a_living_one_kept(root):
    stale = Path(f"/dev/shm/{900_000 + os.getpid() % 90_000}_locals")  # no other run of this test has it
    if not stale.parent.is_dir():
        pytest.skip("shared memory is not listed on this system")
    spec = build_dataspec(config(local=str(root)), "train", seed=0, device_batch_size=8)
    dataset = loader_of(spec).dataset
    assert isinstance(dataset, ImageStream)
    prefix = dataset._shm_prefix_int
    stale.write_bytes(b"left")
    loader_module._clear_stale_shared_memory.cache_clear()
    loader_module._clear_stale_shared_memory()
    assert not stale.exists()
    assert Path(f"/dev/shm/{prefix:06}_locals").exists()


# Composer


class Recorder(ComposerModel):
    """A model that notes the samples of its training batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, NUM_CLASSES)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen.append(tuple(batch["sample_id"].tolist()))
        return self.linear(batch["image"].mean((2, 3)))

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch["target"])


def train(root: Path, folder: Path, duration: str, interval: str, **options) -> list[tuple[int, ...]]:
    reproducibility.seed_all(0)
    model = Recorder()
    cfg = config(local=str(root), num_workers=2)
    trainer = Trainer(
        model=model,
        train_dataloader=build_dataspec(cfg, "train", seed=1, device_batch_size=8),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=duration,
        save_folder=str(folder),
        save_interval=interval,
        save_overwrite=True,
        device="cpu",
        progress_bar=False,
        **options,
    )
    trainer.fit()
    trainer.close()
    return model.seen


@pytest.mark.parametrize("stop, interval", [("1ep", "1ep"), ("10ba", "10ba"), ("7ba", "7ba")])
def test_composer_resumes_at_the_next_sample(root, tmp_path, stop, interval):
    unbroken = train(root, tmp_path / "a", "2ep", "2ep")
    first = train(root, tmp_path / "b", stop, interval)
    second = train(root, tmp_path / "b", "2ep", "2ep", load_path=str(tmp_path / "b" / "latest-rank0.pt"))
    assert len(unbroken) == 14
    assert first + second == unbroken
