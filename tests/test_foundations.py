"""Everything of Composer and Streaming that docs/foundations.md lists is there, and is all that we reach for."""

import contextlib
import gc
import importlib
import inspect
import multiprocessing
import os
import re
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Algorithm, Callback, Trainer
from composer.algorithms import EMA
from composer.callbacks import CheckpointSaver
from composer.core import Event, State, Time, Timestamp
from composer.utils import LibcloudObjectStore, checkpoint, dist
from composer.utils.dist import MissingEnvironmentError
from streaming import Stream, StreamingDataset
from streaming.base.storage import download as streaming_download
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from tests.callbacks.tiny_run import build
from tests.data.mds.test_stream import write_split
from vitcomposer import foundations

# Composer


class Events(Callback):
    """What happened, in order: the events of a run, and what others note."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.losses: list[float] = []

    def run_event(self, event: Event, state: State, logger: Any) -> None:
        self.seen.append(event.name)
        if event == Event.BATCH_END:
            self.losses.append(state.total_loss_dict["loss/train/total"])  # pyright: ignore[reportOptionalSubscript]


class Before(Algorithm):
    def __init__(self, events: Events) -> None:
        self.events = events

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BATCH_START, Event.BATCH_END, Event.EVAL_START)

    def apply(self, event: Event, state: State, logger: Any) -> None:
        self.events.seen.append(f"algorithm at {event.name}")


def test_order_of_events() -> None:
    events = Events()
    trainer = build("1ep", callbacks=[events])
    trainer.state.algorithms = [Before(events)]
    trainer.fit()
    trainer.close()
    step = ["BEFORE_TRAIN_BATCH", "BEFORE_FORWARD", "AFTER_FORWARD", "BEFORE_LOSS", "AFTER_LOSS", "BEFORE_BACKWARD"]
    step += ["AFTER_BACKWARD", "AFTER_TRAIN_BATCH"]
    batch = ["BEFORE_DATALOADER", "AFTER_DATALOADER", "algorithm at BATCH_START", "BATCH_START", *step]
    batch += ["algorithm at BATCH_END", "BATCH_END", "BATCH_CHECKPOINT"]
    start = ["INIT", "BEFORE_LOAD", "AFTER_LOAD", "FIT_START", "ITERATION_START", "EPOCH_START"]
    one = ["EVAL_BATCH_START", "EVAL_BEFORE_FORWARD", "EVAL_AFTER_FORWARD", "EVAL_BATCH_END"]
    evaluation = ["EVAL_BEFORE_ALL", "algorithm at EVAL_START", "EVAL_START", *one * 4, "EVAL_END", "EVAL_AFTER_ALL"]
    end = ["BEFORE_DATALOADER", "EPOCH_END", *evaluation, "EPOCH_CHECKPOINT"]
    seen = [name for name in events.seen if not name.startswith("EVAL_BEFORE_DATALOADER")]
    assert seen == [*start, *batch * 4, *end, "FIT_END"]
    assert len(events.losses) == 4 and events.losses[-1] < events.losses[0]


def test_optimizer_is_stepped_with_a_closure() -> None:
    """In which the loss is read behind the last gradient, and before a weight moves."""
    events = Events()
    trainer = build("1ba", callbacks=[events])
    (optimizer,) = trainer.state.optimizers
    original, weight = optimizer.step, next(trainer.state.model.parameters())

    def step(*args: Any, closure: Callable[..., Any] | None = None, **options: Any) -> Any:
        assert closure is not None

        def noting(**kwargs: Any) -> Any:
            before = weight.detach().clone()
            loss = closure(**kwargs)
            events.seen.append(f"loss of type {type(loss).__name__}, weights same: {torch.equal(weight, before)}")
            return loss

        return original(*args, closure=noting, **options)

    optimizer.step = step
    trainer.fit()
    trainer.close()
    at = events.seen.index("AFTER_TRAIN_BATCH")
    assert events.seen[at + 1 : at + 3] == ["loss of type float, weights same: True", "BATCH_END"]


def test_forget_engine() -> None:
    def closed() -> tuple[Trainer, weakref.ref[State]]:
        trainer = build("1ba", callbacks=[])
        trainer.close()
        return trainer, weakref.ref(trainer.state)

    trainer, state = closed()
    del trainer
    gc.collect()
    assert state() is not None, "Composer lets go of it by itself: forget_engine can go"
    trainer, other = closed()
    foundations.forget_engine(trainer)
    del trainer
    gc.collect()
    assert state() is None and other() is None


def test_lean_steps() -> None:
    """The copy is Composer's, of the batch after its transforms; what else the Trainer copies stays a copy."""

    def trained(*, lean: bool) -> tuple[list[int], dict[str, torch.Tensor]]:
        copies: list[int] = []

        class Counted(torch.Tensor):
            def __deepcopy__(self, memo: Any) -> torch.Tensor:
                copies.append(1)
                return self.clone()

        trainer = build("3ba", callbacks=[], eval_interval="1ba")
        spec: Any = trainer._train_data_spec
        spec.microbatch_transforms = lambda batch: {**batch, "image": batch["image"].as_subclass(Counted)}
        with foundations.lean_steps(trainer) if lean else contextlib.nullcontext():
            assert ("_debug_log" in vars(trainer.engine)) is lean
            trainer.fit()
        assert "_debug_log" not in vars(trainer.engine)
        return copies, trainer.state.model.state_dict()

    (copied, theirs), (none, ours) = trained(lean=False), trained(lean=True)
    assert len(copied) == 3, "Composer copies no batch any more: lean_steps can go"
    assert none == [] and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def saved_run(folder: Path) -> Path:
    saver = CheckpointSaver(folder=str(folder), save_interval="1ep", overwrite=True)
    trainer = build("1ep", callbacks=[saver], ema=True)
    trainer.fit()
    trainer.close()
    return next(folder.glob("ep1-*.pt"))


def test_load_checkpoints_with(tmp_path: Path) -> None:
    path, asked = saved_run(tmp_path), []
    theirs = vars(checkpoint)["_torch_load_with_validation"]

    def load(file: Path | str, map_location: str) -> Any:
        asked.append(map_location)
        return torch.load(file, map_location=map_location, weights_only=False)

    with foundations.load_checkpoints_with(load, FileSystemReader):
        trainer = build("2ep", callbacks=[], ema=True, load_path=str(path))
        assert checkpoint.FileSystemReaderWithValidation is FileSystemReader
    trainer.close()
    assert asked == ["cpu"] and trainer.state.timestamp.batch == 4
    assert vars(checkpoint)["_torch_load_with_validation"] is theirs
    assert checkpoint.FileSystemReaderWithValidation is not FileSystemReader
    # A folder of shares needs several ranks: tests/parallel/test_shares.py has them.
    assert "FileSystemReaderWithValidation" in checkpoint.load_sharded_checkpoint.__code__.co_names


def test_save_checkpoints_with(tmp_path: Path) -> None:
    saver = CheckpointSaver(folder=str(tmp_path / "none"), save_interval="2ba", num_checkpoints_to_keep=3)
    saved: list[int] = []

    def save(state: State, logger: Any) -> None:
        assert saver.filename.format(state) == str(
            tmp_path / f"none/ep{state.timestamp.epoch.value}-ba{len(saved) * 2 + 2}-rank0.pt"
        )
        saver.last_checkpoint_batch = state.timestamp.batch
        saved.append(state.timestamp.batch.value)

    foundations.save_checkpoints_with(saver, save)
    trainer = build("1ep", callbacks=[saver])
    trainer.fit()
    trainer.close()
    assert saved == [2, 4], "the end of the epoch is that of step 4, which is saved"
    assert list((tmp_path / "none").glob("*.pt")) == [] and saver.saved_checkpoints == []
    assert callable(saver.save_interval) and saver.num_checkpoints_to_keep == 3
    saver.tmp_dir_for_symlink.cleanup()


def test_checkpoint_has_the_keys_that_we_read(tmp_path: Path) -> None:
    content = torch.load(saved_run(tmp_path), weights_only=False)
    state = content["state"]
    assert isinstance(content["rng"], list) and set(state["model"]) == {
        f"model.{n}.{w}" for n in (1, 3) for w in ("weight", "bias")
    }
    assert state["timestamp"]["Timestamp"]["batch"] == 4 and state["metadata"]["world_size"] == 1
    average = dict(state["algorithms"])["EMA"]
    assert set(average["ema_model"]["named_parameters_dict"]) == set(state["model"])
    assert average["ema_started"] is True and average["ema_model"]["named_buffers_dict"] == {}


@pytest.mark.parametrize(
    ("start", "batch", "share", "begins"),
    [("3ba", 2, 0.9, False), ("3ba", 3, 0.1, True), ("0.5dur", 9, 0.4, False), ("0.5dur", 0, 0.5, True)],
)
def test_average_should_start(start: str, batch: int, share: float, begins: bool) -> None:
    average = EMA(half_life="2ba", ema_start=start)
    state: Any = SimpleNamespace(timestamp=Timestamp(batch=batch), get_elapsed_duration=lambda: Time(share, "dur"))
    assert foundations.average_should_start(average, state) is begins


def test_new_average() -> None:
    model, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    average = foundations.new_average(model)
    assert list(average.named_parameters_dict) == ["weight", "bias"]
    assert list(average.named_buffers_dict) == ["running_mean", "running_var", "num_batches_tracked"]
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert average.named_parameters_dict["weight"].tolist() == [1, 1, 1], "a copy"
    average.swap_params(model)
    assert model.weight.tolist() == [1, 1, 1] and average.named_parameters_dict["weight"].tolist() == [2, 2, 2]
    average.move_params_to_device(destination_model=other)
    assert EMA().ema_model is None


def test_delete_from_libcloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer's own class upon a provider that notes what it is asked; libcloud needs not be installed."""
    deleted: list[tuple[str, str]] = []

    class Provider:
        def get_container(self, container_name: str) -> Any:
            return SimpleNamespace(name=container_name)

        def get_object(self, container: str, key: str) -> tuple[str, str]:
            return container, key

        def delete_object(self, found: tuple[str, str]) -> None:
            deleted.append(found)

    modules = [types.ModuleType(name) for name in ("libcloud", "libcloud.storage", "libcloud.storage.providers")]
    vars(modules[-1])["get_driver"] = lambda name: Provider
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    store = LibcloudObjectStore("AZURE_BLOBS", "runs")
    foundations.delete_from_libcloud(store, "deit/old.pt")
    assert deleted == [("runs", "deit/old.pt")]


def test_composer_asks_for_the_rank_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "3")
    assert dist.get_node_rank() == 3
    monkeypatch.delenv("NODE_RANK")
    monkeypatch.setenv("GROUP_RANK", "3")
    with contextlib.suppress(MissingEnvironmentError):  # once ranks are there it refuses
        assert dist.get_node_rank() == 0, "torchrun's variable is read: ours can go"


# Streaming


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path / "data" / "train")
    return tmp_path / "data"


def plain(root: Path, **options: Any) -> StreamingDataset:
    """Streaming's own data set, not ours."""
    dataset = StreamingDataset(**{"local": str(root), "split": "train", "batch_size": 4, "shuffle": False, **options})
    foundations.open_locks(dataset)
    return dataset


def test_shard_codes(root: Path) -> None:
    codes = foundations.shard_codes()
    assert (codes.remote, codes.preparing, codes.local) == (1, 2, 3)
    assert set(foundations.shard_states(plain(root)).tolist()) == {codes.local}


def test_shard_states_and_access_times(root: Path) -> None:
    dataset, codes = plain(root), foundations.shard_codes()
    states, times = foundations.shard_states(dataset), foundations.access_times(dataset)
    assert states.shape == times.shape == (dataset.num_shards,) and (states.itemsize, times.itemsize) == (1, 8)
    states[1], times[1] = codes.remote, 0
    dataset.prepare_shard(1)
    assert states[1] == codes.local and times[1] > 0, "the memory that Streaming itself reads and writes"


def test_locks(root: Path, tmp_path: Path) -> None:
    dataset = plain(root)
    foundations.put_locks(dataset, tmp_path / "barrier", tmp_path / "cache")
    foundations.open_locks(dataset)
    lock = foundations.cache_lock(dataset)
    dataset.prepare_shard(0)
    assert foundations.cache_lock(dataset) is lock, "Streaming has not made another"
    assert Path(lock.lock_file) == tmp_path / "cache" and (tmp_path / "cache").exists()
    foundations.wait_for_workers(dataset, 1)
    assert (tmp_path / "barrier").exists()

    def prepare() -> None:
        foundations.open_locks(dataset)
        dataset.prepare_shard(0)

    process = multiprocessing.get_context("fork").Process(target=prepare)
    with lock:
        process.start()
        process.join(0.3)
        assert process.is_alive(), "Streaming waits for the lock that we hold"
    process.join(10)
    assert process.exitcode == 0


def test_evict_coldest(root: Path, tmp_path: Path) -> None:
    dataset, codes = plain(tmp_path / "cache", remote=str(root), cache_limit="1mb"), foundations.shard_codes()
    states, times = foundations.shard_states(dataset), foundations.access_times(dataset)
    for shard in (0, 1, 2):
        dataset.prepare_shard(shard)
    times[:3] = [30, 10, 20]
    before = dataset.cache_usage
    with foundations.cache_lock(dataset):
        foundations.evict_coldest(dataset)
    assert states[:3].tolist() == [codes.local, codes.remote, codes.local] and dataset.cache_usage < before
    assert [(tmp_path / f"cache/train/shard.0000{n}.mds").exists() for n in (0, 1, 2)] == [True, False, True]


def test_number_in_memory(root: Path) -> None:
    chosen = 500_000 + os.getpid() % 400_000
    with foundations.choose_number(lambda: chosen):
        dataset = plain(root)
    assert foundations.number_in_memory(dataset) == chosen
    assert not Path("/dev/shm").is_dir() or Path(f"/dev/shm/{chosen}_locals").exists()
    with foundations.choose_number(None):
        assert foundations.number_in_memory(plain(root)) != chosen
    assert foundations.number_in_memory(plain(root)) != chosen


def test_begin_epoch(root: Path) -> None:
    dataset = plain(root)
    world, epoch, first = foundations.begin_epoch(dataset)
    assert (world.num_workers, world.worker, epoch, first) == (1, 0, 0, 0)
    assert foundations.rank_of(dataset).num_ranks == 1
    assert foundations.begin_epoch(dataset)[1:] == (1, 0)
    resumed = plain(root)
    resumed.load_state_dict(dataset.state_dict(12, True))
    assert foundations.begin_epoch(resumed)[1:] == (1, 12)
    assert foundations.begin_epoch(resumed)[1:] == (2, 0)


def test_wait_for_workers(root: Path) -> None:
    dataset = plain(root)

    def come() -> None:
        foundations.open_locks(dataset)
        foundations.wait_for_workers(dataset, 2)

    process = multiprocessing.get_context("fork").Process(target=come)
    process.start()
    process.join(0.3)
    assert process.is_alive(), "it waits for the second"
    foundations.wait_for_workers(dataset, 2)
    process.join(10)
    assert process.exitcode == 0


def test_transfer_with(tmp_path: Path) -> None:
    write_split(tmp_path / "far/train", 12, compression="zstd")
    cache = tmp_path / "near/train"
    cache.mkdir(parents=True)
    (cache / "index.json").write_bytes((tmp_path / "far/train/index.json").read_bytes())
    stream = Stream(remote=str(tmp_path / "far"), local=str(tmp_path / "near"), split="train", keep_zip=True)
    asked: list[Any] = []

    def fetch(name: str) -> str:
        asked.append(name)
        (cache / name).write_bytes((tmp_path / "far/train" / name).read_bytes())
        return str(cache / name)

    def unpack(info: Any, packed: str, raw: str, compression: str | None) -> None:
        asked.append((info.basename, packed, raw, compression))
        Path(raw).write_bytes(b"unpacked")

    foundations.transfer_with(stream, fetch, unpack)
    shard = stream.get_shards(foundations.rank_of(plain(tmp_path / "far")), False)[0]
    stream.apply_default({"download_retry": 1, "download_timeout": 5.0, "validate_hash": None, "keep_zip": True})
    stream.prepare_shard(shard)
    raw, packed = "shard.00000.mds", "shard.00000.mds.zstd"
    assert asked == [packed, (packed, str(cache / packed), str(cache / raw), "zstd")]


def test_streaming_reads_the_variables_that_we_do() -> None:
    source = inspect.getsource(streaming_download)
    for name in ("S3_ENDPOINT_URL", "MOSAICML_STREAMING_AWS_REQUESTER_PAYS"):
        assert f"os.environ.get('{name}'" in source
    launched = inspect.getsource(importlib.import_module("streaming.base.distributed"))
    assert set(re.findall(r"environ.get\('(\w+)'", launched)) == {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
    }
