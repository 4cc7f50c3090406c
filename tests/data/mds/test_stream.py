"""Reading MDS: samples, resumption, and every fault named in time."""

import json
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vitcomposer.data.conversion.inspect import inspect_data
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.mds.stream import ImageStream, StreamOptions
from vitcomposer.errors import ConfigError, ShardError

pytestmark = pytest.mark.timeout(60)

NUM_SAMPLES = 60
NUM_CLASSES = 7


def image(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def jpeg(index: int) -> bytes:
    file = BytesIO()
    image(index).save(file, "JPEG")
    return file.getvalue()


def raw_sample(pixels: np.ndarray) -> bytes:
    return b"\0RAW" + np.array([*pixels.shape[:2], 0], "<u4").tobytes() + pixels.tobytes()


def write_split(folder: Path, num_samples: int = NUM_SAMPLES, **options) -> Path:
    """Shards of about ten samples each."""
    settings = {"columns": {"image": "bytes", "label": "int"}, "hashes": ["xxh64"], "size_limit": 9000, **options}
    with MDSWriter(out=str(folder), **settings) as writer:
        for index in range(num_samples):
            writer.write({"image": jpeg(index), "label": index % NUM_CLASSES})
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path / "data" / "train")
    return tmp_path / "data"


def open_stream(root: Path, **options) -> ImageStream:
    settings = {"split": "train", "batch_size": 4, "shuffle": True, "seed": 3, **options}
    return ImageStream(local=str(root), **settings)


def keep(samples: list) -> list:
    """Copies, since a view of a mapped file cannot be sent to another process."""
    views = ("image", "image_small")  # of a map, which no process can send
    return [{key: bytes(v) if key in views and v is not None else v for key, v in s.items()} for s in samples]


OPENED: list[DataLoader] = []


def end_workers() -> None:
    """Left to the garbage collector, as after an exception, torch's loader waits 5 s for each of its workers."""
    while OPENED:
        iterator = OPENED.pop()._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


@pytest.fixture(autouse=True)
def opened():
    yield
    end_workers()


def load(stream: ImageStream, workers: int, *, drop_last: bool = True) -> DataLoader:
    loader = DataLoader(
        stream,
        batch_size=stream.batch_size,
        num_workers=workers,
        collate_fn=keep,
        drop_last=drop_last,
        persistent_workers=workers > 0,
        timeout=30 if workers else 0,
    )
    OPENED.append(loader)
    return loader


def batches(loader: DataLoader) -> list[list[tuple[int, int, int]]]:
    return [[(s["sample_id"], s["copy"], s["epoch"]) for s in batch] for batch in loader]


def shard(root: Path, number: int = 2) -> Path:
    return root / "train" / f"shard.{number:05}.mds"


# Samples


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_holds_every_sample_with_its_own_bytes(root, workers):
    stream = open_stream(root)
    loader = load(stream, workers)
    samples = [sample for batch in loader for sample in batch]
    assert sorted(sample["sample_id"] for sample in samples) == list(range(NUM_SAMPLES))
    for sample in samples:
        assert sample["image"] == jpeg(sample["sample_id"])
        assert sample["label"] == sample["sample_id"] % NUM_CLASSES
        assert (sample["copy"], sample["epoch"]) == (0, 0)
    second = [sample for batch in loader for sample in batch]
    assert {sample["epoch"] for sample in second} == {1}
    assert [s["sample_id"] for s in second] != [s["sample_id"] for s in samples]


@pytest.mark.parametrize("repeats", [1, 3])
def test_batches_are_the_same_with_any_number_of_workers(root, repeats):
    epochs = {}
    for workers in (0, 1, 2):
        loader = load(open_stream(root, repeats=repeats), workers)
        epochs[workers] = [batches(loader) for _ in range(2)]
    assert epochs[0] == epochs[1] == epochs[2]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [4, 7])
def test_len_of_the_loader_is_the_number_of_batches(root, workers, drop_last, batch_size):
    loader = load(open_stream(root, batch_size=batch_size), workers, drop_last=drop_last)
    for _ in range(2):
        assert len(list(loader)) == len(loader)


def test_evaluation_marks_samples_that_only_pad_the_ranks(root):
    stream = open_stream(root, shuffle=False)
    assert stream[7]["label"] == 0
    padded = stream[7 + NUM_SAMPLES]
    assert (padded["sample_id"], padded["copy"], padded["label"]) == (7, 0, IGNORE_LABEL)


def test_shared_decodes_give_copies_one_after_the_other(root):
    stream = open_stream(root, batch_size=6, repeats=3, shared_decodes=True)
    for batch in batches(load(stream, 2)):
        assert [copy for _, copy, _ in batch] == [0, 1, 2] * 2
        assert len({sample_id for sample_id, _, _ in batch}) == 2


def shard_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shards"]


def test_no_thread_runs_once_all_shards_are_here_or_after_an_epoch(root, tmp_path):
    stream = open_stream(tmp_path / "cache", remote=str(root))
    samples = iter(stream)
    next(samples)
    begin = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - begin < 0.1  # it sleeps, or has brought everything
    samples.close()
    for thread in shard_threads():
        thread.join(5)
    assert not shard_threads()
    list(stream)
    samples = iter(stream)
    next(samples)
    assert not shard_threads()


def test_two_data_sets_live_in_one_process(root, tmp_path):
    write_split(root / "val", 10)
    for remote in (None, str(tmp_path / "data")):
        local = root if remote is None else tmp_path / "cache"
        train = open_stream(local, remote=remote)
        val = open_stream(local, remote=remote, split="val", shuffle=False)
        for _ in range(2):
            assert len(batches(load(train, 0))) == 15
            assert [s for batch in batches(load(val, 0, drop_last=False)) for s in batch][9][0] == 9


def test_an_epoch_broken_off_is_followed_by_a_whole_one(root):
    for workers in (0, 2):
        loader = load(open_stream(root), workers)
        next(iter(loader))
        assert len(list(loader)) == 15


def test_a_loader_with_workers_works_after_one_without(root):
    stream = open_stream(root)
    assert len(list(load(stream, 0))) == len(list(load(stream, 2))) == 15


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch, seen, repeats", [(0, 12, 1), (1, 40, 3), (1, 0, 1), (1, 60, 3)])
def test_resume_yields_exactly_the_remaining_samples(root, workers, epoch, seen, repeats):
    unbroken = load(open_stream(root, repeats=repeats), 0)
    epochs = [batches(unbroken) for _ in range(3)]
    first = open_stream(root, repeats=repeats)
    loader = load(first, workers)
    for _ in range(epoch if seen == 0 else epoch + 1):
        iterator = iter(loader)
        for _ in range(15 if seen == 0 else seen // 4):
            next(iterator)
    state = json.loads(json.dumps(first.state_dict(seen, True)))
    assert state["epoch"] == epoch
    second = open_stream(root, repeats=repeats)
    second.load_state_dict(state)
    loader = load(second, workers)
    assert batches(loader) == epochs[epoch][seen // 4 :]
    assert batches(loader) == epochs[epoch + 1]


def test_state_before_the_first_epoch_resumes_at_the_first_epoch(root):
    stream = open_stream(root)
    state = stream.state_dict(0, True)
    assert (state["epoch"], state["sample_in_epoch"]) == (0, 0)
    stream.load_state_dict({**state, "epoch": 2, "sample_in_epoch": 8})
    assert stream.state_dict(8, True)["epoch"] == 2
    assert {sample[2] for batch in batches(load(stream, 0)) for sample in batch} == {2}


def damage(path: Path, fault: str) -> None:
    data = bytearray(path.read_bytes())
    if fault == "deleted":
        path.unlink()
        return
    if fault == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if fault == "truncated" else data)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["deleted", "truncated", "flipped"])
@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_bad_shard_is_named_within_two_seconds(root, tmp_path, workers, fault, place):
    if place == "remote":
        damage(shard(root), fault)
        stream = open_stream(tmp_path / "cache", remote=str(root))
    else:
        stream = open_stream(root)
        damage(shard(root), fault)
    loader = load(stream, workers)
    begin = time.monotonic()
    with pytest.raises(ShardError, match=str(shard(root))) as caught:
        list(loader)
    assert time.monotonic() - begin < 2
    cause = {"deleted": "not exist|No such file", "truncated": "its index says", "flipped": "xxh64"}[fault]
    assert caught.match(cause)
    with pytest.raises(ShardError, match=str(shard(root))):
        list(loader)


@pytest.mark.parametrize("fault", ["deleted", "truncated"])
def test_a_shard_lost_in_the_middle_of_a_run_is_named(root, fault):
    loader = load(open_stream(root), 0)
    list(loader)
    damage(shard(root), fault)
    with pytest.raises(ShardError, match=shard(root).name):
        list(loader)


@pytest.mark.parametrize("fault", ["deleted", "truncated"])
def test_a_bad_local_shard_is_found_when_the_data_set_is_opened(root, fault):
    damage(shard(root), fault)
    with pytest.raises(ShardError, match=f"{shard(root)} cannot be read: .*vitcomposer convert"):
        open_stream(root)


@pytest.mark.parametrize("fault", ["truncated", "flipped"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_cache_is_downloaded_again(root, tmp_path, fault, workers):
    cache = tmp_path / "cache"
    list(load(open_stream(cache, remote=str(root)), 0))
    damage(shard(cache), fault)
    samples = [s for batch in load(open_stream(cache, remote=str(root)), workers) for s in batch]
    assert sorted(s["sample_id"] for s in samples) == list(range(NUM_SAMPLES))
    assert shard(cache).read_bytes() == shard(root).read_bytes()


def test_a_failed_download_leaves_nothing_in_the_cache(root, tmp_path):
    good = shard(root).read_bytes()
    damage(shard(root), "flipped")
    with pytest.raises(ShardError):
        list(load(open_stream(tmp_path / "cache", remote=str(root)), 0))
    assert not shard(tmp_path / "cache").exists()
    shard(root).write_bytes(good)
    assert len(list(load(open_stream(tmp_path / "cache", remote=str(root)), 0))) == 15


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_limit_keeps_the_cache_small_and_the_epoch_whole(tmp_path, workers):
    root = write_split(tmp_path / "data" / "train", 100).parent
    cache = tmp_path / "cache"
    options = StreamOptions(cache_limit="40kb", predownload=4)
    for _ in range(2):  # the second run begins with a full cache
        loader = load(open_stream(cache, remote=str(root), options=options), workers)
        for _ in range(2):
            ids = sorted(s["sample_id"] for batch in loader for s in batch)
            assert ids == list(range(100))
            assert sum(path.stat().st_size for path in cache.rglob("*.mds")) <= 40 * 1024
        del loader


@pytest.mark.parametrize("has_remote", [False, True])
def test_cache_limit_deletes_nothing_of_a_local_data_set(root, has_remote):
    before = sorted(root.rglob("*.mds"))
    stream = open_stream(root, remote=str(root) if has_remote else None, options=StreamOptions(cache_limit="40kb"))
    assert len(list(load(stream, 0))) == 15
    assert sorted(root.rglob("*.mds")) == before


@pytest.mark.parametrize("place", ["local", "remote"])
def test_compressed_shards_without_the_hash_are_read(tmp_path, place):
    write_split(tmp_path / "data" / "train", compression="zstd", hashes=["sha1"])
    where = {"remote": str(tmp_path / "data")} if place == "remote" else {}
    stream = open_stream(tmp_path / ("cache" if where else "data"), **where)
    samples = [s for batch in load(stream, 2) for s in batch]
    assert sorted(s["sample_id"] for s in samples) == list(range(NUM_SAMPLES))


def test_a_missing_split_names_the_folder_the_splits_and_the_command(root):
    with pytest.raises(ConfigError, match=f"'valid', got '{root}', where the splits are: train.*vitcomposer convert"):
        open_stream(root, split="valid")
    with pytest.raises(ConfigError, match="/nowhere', which does not exist"):
        open_stream(Path("/nowhere"))


def test_a_missing_remote_index_names_its_uri(root, tmp_path):
    with pytest.raises(ConfigError, match=f"{root}/valid/index.json cannot be read: FileNotFoundError"):
        open_stream(tmp_path / "cache", remote=str(root), split="valid")
    with pytest.raises(ConfigError, match="data.remote must be a location that Streaming reads, got 'ftpx://a/b'"):
        open_stream(tmp_path / "cache", remote="ftpx://a/b")


@pytest.mark.parametrize(
    "options, message",
    [({"validate_hash": "crc"}, "must be null or one of .*'crc'"), ({"num_canonical_nodes": 99}, "must divide")],
)
def test_options_that_cannot_work_are_refused(root, options, message):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}.*{message}"):
        open_stream(root, options=StreamOptions(**options))


@pytest.mark.parametrize("name", ["../shard.00000.mds", "/etc/passwd", "a/../../b.mds", "..\\b.mds", "c:\\b.mds"])
def test_shard_names_outside_the_folder_are_refused(root, name):
    index = root / "train" / "index.json"
    listing = json.loads(index.read_text())
    listing["shards"][1]["raw_data"]["basename"] = name
    index.write_text(json.dumps(listing))
    with pytest.raises(ConfigError, match="must lie below its folder"):
        open_stream(root)


@pytest.mark.parametrize(
    "text, message", [("{", "must be the index"), ('{"version": 2, "shards": []}', "must list at least one")]
)
def test_a_broken_index_is_named(root, text, message):
    (root / "train" / "index.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{root}/train/index.json {message}"):
        open_stream(root)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["local", "remote"])
def test_an_index_that_never_ends_is_not_read(root, tmp_path, place, monkeypatch):
    (root / "train" / "index.json").unlink()
    (root / "train" / "index.json").symlink_to("/dev/zero")
    where = {"remote": str(root)} if place == "remote" else {}
    with pytest.raises(ConfigError, match="index.json .*it is no file"):
        open_stream(tmp_path / "cache" if where else root, **where)
    with pytest.raises(ValueError, match="index.json is no file"):
        inspect_data(root)


def test_an_index_of_another_size_than_any_is_not_downloaded(root, tmp_path):
    with (root / "train" / "index.json").open("r+b") as file:
        file.truncate(1 << 40)  # without a byte on the disk
    with pytest.raises(ConfigError, match=r"index.json cannot be read: it has 1099511627776 bytes, at most 268435456"):
        open_stream(tmp_path / "cache", remote=str(root))
    with pytest.raises(ValueError, match=r"index.json has 1099511627776 bytes, at most 268435456"):
        inspect_data(root)
