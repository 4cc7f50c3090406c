"""A teacher's answers written once and read beside the images: the losses of a live teacher, and every refusal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter, StreamingDataset

from tests.conftest import PHOTOS, ROOT, TRAIN_PER_CLASS, run_train, tiny_photo_overrides
from tests.test_folder_lock import hold_by_parent
from tests.training.test_train import losses
from vitcomposer import config
from vitcomposer.data.loader import build_dataspec
from vitcomposer.errors import ConfigError, ShardError
from vitcomposer.losses import DistillationLoss, TeacherAnswers, soft_target_cross_entropy
from vitcomposer.models import build_model
from vitcomposer.schema import Distill
from vitcomposer.teacher.cache import MANIFEST, CachedTeacher, open_cache
from vitcomposer.teacher.rows import column_encodings, encode_rows, row_dtype
from vitcomposer.teacher.writer import highest, write_cache

YAML = str(ROOT / "yamls/deit_s_distilled_cached.yaml")
IMAGES, SETS = len(PHOTOS) * TRAIN_PER_CLASS, 5
OPTIONS = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    teacher = build_model("deit_tiny_patch16", num_classes=len(PHOTOS), image_size=32, **OPTIONS)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # the head begins at zero, which no student learns from
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(teacher.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def overrides(photo_mds: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A student and a teacher of some thousand weights; 12 steps an epoch."""
    return [
        *tiny_photo_overrides(photo_mds, tmp_path_factory.mktemp("runs"), "run"),
        "model.embed_dim=32",
        "model.num_heads=2",
        "model.depth=1",
        "teacher.name=deit_tiny_patch16",
        f"teacher.weights={weights}",
        *[f"teacher.options.{key}={value}" for key, value in OPTIONS.items()],
        "augment.repeated_augmentation=1",
        "optimizer.lr=0.1",
        "run.progress_bar=false",
    ]


@pytest.fixture(scope="module")
def whole(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All logits, in shards of 48 images; the teacher's batches are all as large as those of a live one."""
    folder = tmp_path_factory.mktemp("cache") / "all"
    write_cache(load(overrides), folder, crop_sets=SETS, top_k=None, batch_size=16, shard_images=48)
    return folder


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def load(overrides: list[str], *more: str) -> Distill:
    return config.load(YAML, [*overrides, *more])


def opened(overrides: list[str], folder: Path, *more: str) -> CachedTeacher:
    return open_cache(load(overrides, f"cache.local={folder}", *more))


def batches(overrides: list[str], folder: Path, *more: str) -> list[dict[str, Any]]:
    """The first epoch."""
    cfg = load(overrides, f"cache.local={folder}", *more)
    return list(build_dataspec(cfg, "train", seed=cfg.seed, device_batch_size=16, teacher=open_cache(cfg)).dataloader)


def columns_of(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: batch[f"teacher_{name}"].numpy() for name in ("classes", "logits", "rest")}


def test_fifty_steps_have_the_losses_of_the_live_teacher(overrides: list[str], whole: Path, tmp_path: Path) -> None:
    """Bit for bit, with workers and a resume: both teachers see batches of 16, though not the same ones."""
    shared = [*overrides, f"run.folder={tmp_path}", "run.eval_interval=50ba", "run.save_interval=25ba"]
    shared += ["schedule.alpha_f=1"]  # the same learning rates however long the run is
    read = [*shared, "run.name=cached", f"cache.local={whole}", "data.num_workers=2"]
    for steps in (25, 50):
        assert run_train([YAML, *read, f"max_duration={steps}ba"]) == 0
    assert run_train([YAML, *shared, "run.name=live", "cache=null", "max_duration=50ba"]) == 0
    cached, live = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(live) == 50 and cached == live
    assert len(set(live)) == 50 and np.mean(live[-10:]) < np.mean(live[:10]) - 0.02, "it should learn"


def test_ten_of_a_hundred_logits_change_the_loss_by_less_than_the_bound() -> None:
    """The mass that is not stored is spread evenly: its entropy and the student's range over it bound the change."""
    generator = torch.Generator().manual_seed(0)
    every = TeacherAnswers.of_logits(3 * torch.randn(64, 100, generator=generator))
    student = torch.randn(64, 100, generator=generator)
    ten = highest(every, 10)
    logits = every.logits.float()
    assert torch.equal(ten.logits, logits.topk(10).values.half())
    torch.testing.assert_close(
        torch.logaddexp(ten.logits.float().logsumexp(1), ten.rest), logits.logsumexp(1), rtol=1e-5, atol=1e-5
    )
    loss = DistillationLoss(soft_target_cross_entropy, kind="soft", alpha=1.0, temperature=1.0, kl="batch")
    exact, short = (loss(student, student.softmax(1), answers) for answers in (every, ten))
    left = (ten.rest - logits.logsumexp(1)).exp()
    span = student.amax(1) - student.amin(1)
    assert 0 < abs(exact - short) < (left * (np.log(90) + span)).mean()


def test_of_equal_logits_the_lower_classes_are_stored() -> None:
    answers = highest(TeacherAnswers.of_logits(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])), 2)
    assert answers.classes.tolist() == [[1, 2]]
    assert answers.rest.item() == pytest.approx(np.log(np.exp([2, 1, 0]).sum()))


def test_shard_is_what_mdswriter_makes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = np.frombuffer(rng.bytes(7 * row_dtype(3).itemsize), row_dtype(3)).copy()
    rows["logits"], rows["rest"] = rng.normal(size=(7, 3)), -np.inf
    data, entry = encode_rows(rows, "shard.00000.mds")
    with MDSWriter(columns=column_encodings(3), out=str(tmp_path), hashes=["xxh64"], size_limit=None) as writer:
        for row in rows:
            writer.write({name: row[name] for name in rows.dtype.names or ()})
    assert (tmp_path / "shard.00000.mds").read_bytes() == data
    assert json.loads((tmp_path / "index.json").read_text())["shards"] == [entry]


def test_a_set_is_a_streaming_data_set_in_the_order_of_the_samples(whole: Path) -> None:
    data = StreamingDataset(local=str(whole), split="set.0003", shuffle=False, batch_size=1)
    assert [row["sample_id"] for row in data] == list(range(IMAGES))
    assert data[60]["classes"].tolist() == list(range(len(PHOTOS)))


def test_batches_are_the_same_with_any_number_of_workers(overrides: list[str], whole: Path) -> None:
    first = batches(overrides, whole)
    for batch, other in zip(first, batches(overrides, whole, "data.num_workers=1"), strict=True):
        assert all(torch.equal(batch[key], other[key]) for key in batch)
    assert first[0]["teacher_classes"].dtype == torch.int32 and first[0]["teacher_logits"].dtype == torch.float16
    assert torch.isneginf(first[0]["teacher_rest"]).all()


def test_answers_in_batches_of_another_size_differ_by_a_rounding(
    overrides: list[str], whole: Path, tmp_path: Path
) -> None:
    """Matrix products of other shapes add up in another order: now and then float16 rounds to its neighbour."""
    write_cache(load(overrides), tmp_path, crop_sets=1, top_k=None, batch_size=27, shard_images=192)
    first, other = (StreamingDataset(local=str(root), split="set.0000", batch_size=1) for root in (whole, tmp_path))
    ours, theirs = (np.stack([row["logits"] for row in rows]).astype(np.float32) for rows in (first, other))
    assert np.mean(ours != theirs) < 0.02
    np.testing.assert_allclose(ours, theirs, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("more", [[], ["augment.shared_decodes=true"]])
def test_copies_of_a_sample_get_the_sets_in_turn(overrides: list[str], whole: Path, more: list[str]) -> None:
    sets = [StreamingDataset(local=str(whole), split=f"set.{s:04}", shuffle=False, batch_size=1) for s in range(SETS)]
    seen: dict[int, int] = {}
    for batch in batches(overrides, whole, "augment.repeated_augmentation=3", *more):
        for i, sample in enumerate(batch["sample_id"].tolist()):
            crop_set = seen[sample] = seen.get(sample, -1) + 1
            np.testing.assert_array_equal(columns_of(batch)["logits"][i], sets[crop_set][sample]["logits"])
    assert set(seen.values()) == {2}


def test_killed_writer_keeps_its_shards_and_ends_with_the_same_cache(
    overrides: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    sizes = ["--crop-sets", str(SETS), "--top-k", "all", "--shard-images", "48", "--batch-size", "16"]
    command = [sys.executable, "-m", "vitcomposer", "cache-teacher", YAML, *overrides, *sizes, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    notes, shards = out / ".cache-teacher", "set.*/shard.*.mds"
    while process.poll() is None and not list(notes.glob("set.*/*.json")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    assert f"{SETS} crop-sets of {IMAGES} images" in said and "bytes a view" in said and "after 5 epochs" in said
    kept = {path: path.stat().st_mtime_ns for path in notes.glob("set.*/*.json")}
    assert not (out / MANIFEST).exists() and 0 < len(kept) < SETS * 4
    with pytest.raises(ConfigError, match=r"cache\.local must hold teacher\.json.*broken off is finished"):
        opened(overrides, out)
    note = min(kept)
    torn = out / note.parent.name / f"shard.{note.stem}.mds"
    torn.write_bytes(torn.read_bytes()[:-1])
    write_cache(load(overrides), out, crop_sets=SETS, top_k=None, batch_size=16, shard_images=48)
    assert sum(path.stat().st_mtime_ns == then for path, then in kept.items()) == len(kept) - 1
    for path in [*whole.glob(shards), *whole.glob("set.*/index.json"), whole / MANIFEST]:
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert not (out / ".partial").exists()


def test_a_disk_without_room_leaves_no_plan_that_binds_the_next_call(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"crop_sets": 1, "batch_size": 16, "shard_images": 48}
    with monkeypatch.context() as full, pytest.raises(ConfigError, match="must have room for .* store fewer classes"):
        full.setattr("vitcomposer.stores.objects.LocalStore.free_bytes", lambda _: 0)
        write_cache(load(overrides), tmp_path, top_k=None, **sizes)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    write_cache(load(overrides), tmp_path, top_k=3, **sizes)
    assert json.loads((tmp_path / MANIFEST).read_text())["top_k"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["torchrun", "--standalone", "--nproc-per-node"], ["composer", "-n"]])
def test_two_ranks_write_the_cache_of_one(
    launcher: list[str], overrides: list[str], whole: Path, tmp_path: Path
) -> None:
    program = str(Path(sys.executable).parent / launcher[0])
    sizes = ["--crop-sets", str(SETS), "--shard-images", "48", "--batch-size", "16"]
    command = ["-m", "vitcomposer", "cache-teacher", YAML, *overrides, *sizes, "--out", str(tmp_path)]
    done = subprocess.run(
        [program, *launcher[1:], "2", *command], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for path in [*whole.glob("set.*/shard.*.mds"), whole / MANIFEST]:
        assert (tmp_path / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_cache_has_one_writer(overrides: list[str], cache: Path) -> None:
    hold_by_parent(cache / ".lock")
    with pytest.raises(ConfigError, match=r"is being written by pid \d+ on .* Wait, stop it, or choose another folder"):
        write_cache(load(overrides), cache, crop_sets=4, top_k=None)
    (cache / ".lock").unlink()


def test_more_sets_are_added_to_those_that_are_there(overrides: list[str], cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.glob("set.*/shard.*.mds")}
    write_cache(load(overrides), cache, crop_sets=SETS + 1, top_k=None, batch_size=16, shard_images=48)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert opened(overrides, cache).crop_sets == SETS + 1
    with pytest.raises(ConfigError, match=f"--crop-sets must be at least {SETS + 1}, .* got {SETS}"):
        write_cache(load(overrides), cache, crop_sets=SETS, top_k=None, batch_size=16, shard_images=48)
    with pytest.raises(ConfigError, match=r"--top-k must be 8 as in .*, got 3\. Repeat the first call"):
        write_cache(load(overrides), cache, crop_sets=SETS + 1, top_k=3, shard_images=48)
    with pytest.raises(ConfigError, match=r"augment\.flip_prob must be 0\.5 as in .*, got 0\.0\..*another --out"):
        write_cache(load(overrides, "augment.flip_prob=0"), cache, crop_sets=6, top_k=None, shard_images=48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("augment.crop_scale=[0.1,1.0]", r"augment\.crop_scale must be \[0\.08, 1\.0\] as in .*, got \[0\.1, 1\.0\]"),
        ("augment.random_erasing=0", r"augment\.random_erasing must be 0\.25 .*Set augment\.random_erasing=0\.25"),
        ("augment.std=[0.5,0.5,0.5]", r"augment\.std must be \[0\.229.*got \[0\.5"),
        ("model.image_size=48", r"teacher\.image_size must be 32 as in"),
        ("model.num_classes=9", r"model\.num_classes must be 8 as in"),
        ("teacher.mean=[0.5,0.5,0.5]", r"teacher\.mean must be \[0\.485"),
        ("teacher.precision=amp_bf16", r"teacher\.precision must be 'fp32' as in"),
        ("teacher.options.depth=2", r"teacher\.options must be .*'depth': 1.*write a cache for this run"),
        ("data.source=synthetic", r"data\.source must be mds with a teacher cache, got 'synthetic'"),
        ("cache.local=nowhere", r"cache\.local must hold teacher\.json, got 'nowhere'\. Write one with"),
    ],
)
def test_cache_of_another_run_is_refused(overrides: list[str], whole: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(overrides, whole, change)


def test_other_weights_and_other_images_are_refused(
    overrides: list[str], whole: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ConfigError, match=r"teacher\.weights must be of sha256 '\w+' as in .*Use the file"):
        opened(overrides, whole, f"teacher.weights={other}")
    capsys.readouterr()
    opened(overrides, whole, "teacher.weights=nowhere.pt")
    assert "teacher.weights=nowhere.pt is not here" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.train_split must be of sha256 '\w+' as in"):
        batches(overrides, whole, "data.train_split=val", "global_train_batch_size=8")


def test_curriculum_with_a_cache_is_refused(overrides: list[str], whole: Path) -> None:
    stages = "algorithms.Curriculum={image_sizes: [16, 32], compute: [0.5, 0.5]}"
    with pytest.raises(ConfigError, match=r"algorithms\.Curriculum must be left out with a cache"):
        load(overrides, f"cache.local={whole}", stages)


def test_softened_answers_need_all_logits(overrides: list[str], cache: Path) -> None:
    manifest = json.loads((cache / MANIFEST).read_text())
    (cache / MANIFEST).write_text(json.dumps({**manifest, "top_k": 3}))
    softened = load(overrides, f"cache.local={cache}", "distillation.temperature=3")
    with pytest.raises(ConfigError, match="distillation.temperature must be 1 with a cache of the 3 highest logits"):
        open_cache(softened)


@pytest.mark.parametrize("top_k", [0, 9])
def test_top_k_outside_the_classes_is_refused(overrides: list[str], tmp_path: Path, top_k: int) -> None:
    with pytest.raises(ConfigError, match=rf"--top-k must be 1 to model\.num_classes=8, or all, got {top_k}"):
        write_cache(load(overrides), tmp_path, crop_sets=1, top_k=top_k)
    assert not list(tmp_path.iterdir())


def test_damaged_shards_are_named(overrides: list[str], cache: Path) -> None:
    shard = cache / "set.0001" / "shard.00002.mds"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ConfigError, match=r"set\.0001/shard\.00002\.mds .*has \d+ bytes, its index says.*Delete"):
        opened(overrides, cache)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"set\.0001/shard\.00002\.mds .*does not exist"):
        opened(overrides, cache)
    shard.write_bytes(data)
    for shard in cache.glob("set.0000/*.mds"):
        data = shard.read_bytes()
        shard.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    with pytest.raises(ShardError, match=r"set\.0000/shard\.0000\d\.mds .*xxh64 is \w+, its index says"):
        batches(overrides, cache)


def test_views_of_another_version_are_refused(overrides: list[str], cache: Path) -> None:
    manifest = json.loads((cache / MANIFEST).read_text())
    (cache / MANIFEST).write_text(json.dumps({**manifest, "seed": 1}))
    with pytest.raises(ShardError, match=r"The view of sample \d+ must be that of set\.0000 .*another version"):
        batches(overrides, cache)
    (cache / MANIFEST).write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(ConfigError, match=r"teacher\.json must be of format 1, .* got 2"):
        opened(overrides, cache)


def test_remote_cache_is_fetched_once_and_mended(overrides: list[str], cache: Path, tmp_path: Path) -> None:
    local, remote = tmp_path / "local", f"cache.remote={cache}"
    first = batches(overrides, local, remote)
    fetched = {path: path.stat().st_mtime_ns for path in local.glob("set.*/*.mds")}
    assert {path.parent.name for path in fetched} == {"set.0000"}, "one epoch needs one set"
    damaged = local / "set.0000" / "shard.00001.mds"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    second = batches(overrides, local, remote)
    assert all(torch.equal(a["teacher_logits"], b["teacher_logits"]) for a, b in zip(first, second, strict=True))
    assert {path for path, then in fetched.items() if path.stat().st_mtime_ns != then} == {damaged}
    os.remove(cache / "set.0000" / "shard.00001.mds")
    damaged.unlink()
    with pytest.raises(ShardError, match=r"set\.0000/shard\.00001\.mds .*FileNotFoundError.*Check that the object"):
        batches(overrides, local, remote, "data.download_retry=1")
