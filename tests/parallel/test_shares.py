"""``run.sharded_checkpoints``: folders to which each rank adds its share; resumed, read and exported like files."""

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import Metadata

from tests.parallel.ranks import STOP, train_on
from tests.parallel.test_fsdp2 import assert_close
from tests.training.test_parallelism import CONVIT, STEPS, overrides
from tests.training.test_train import losses
from vitcomposer.errors import ConfigError
from vitcomposer.evaluation.trained import load_trained
from vitcomposer.models.weights.averages import averaged_weights
from vitcomposer.models.weights.load import check_harmless, read_checkpoint
from vitcomposer.models.weights.sharded import DIGESTS, digests_of_rank
from vitcomposer.runs.checkpoints import damage, finish_shares, newest_whole, partial_of
from vitcomposer.schema import Run

CONTENT: dict[str, Any] = {
    "state": {"model": {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, "step": 3},
    "rng": [{"torch": torch.arange(5), "name": "x"}, {"torch": torch.zeros(5), "name": "y"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):  # one process, without a process group, is said once
        checkpoint.save(CONTENT, storage_writer=checkpoint.FileSystemWriter(tmp_path / "shares"))
    return tmp_path / "shares"


def test_shares_are_read_as_they_were_given(folder: Path) -> None:
    assert damage(folder, read=True) is None
    assert assert_close(read_checkpoint(folder), CONTENT, 0.0) == 4
    looked_at = check_harmless(folder)
    assert looked_at["state"]["step"] == 3 and "model" not in looked_at["state"], "no tensor is read"


def test_damage_is_found(folder: Path) -> None:
    share = next(folder.glob("*.distcp"))
    whole = share.read_bytes()
    share.write_bytes(whole[:-40])
    assert damage(folder, read=False) == f"cut short in {share.name}"
    flipped = bytearray(whole)
    at = whole.index(torch.arange(12.0).numpy().tobytes())
    flipped[at + 5] ^= 1
    share.write_bytes(bytes(flipped))
    assert damage(folder, read=False) is None
    assert str(damage(folder, read=True)).startswith(f"damaged in {share.name}")
    share.unlink()
    assert damage(folder, read=False) == f"without {share.name}"
    (folder / ".metadata").unlink()
    assert damage(folder, read=False) == "without .metadata"


def test_every_flipped_byte_of_shares_has_the_checkpoint_before_taken(tmp_path: Path) -> None:
    clock = {"timestamp": {"Timestamp": {"batch": 3}}, "metadata": {"world_size": 1}}
    content = {"state": {"model": {"a": torch.arange(6.0)}, **clock}}
    before, newest = (tmp_path / f"ep0-ba{step}-rank0.pt" for step in (3, 6))
    for path in (before, newest):
        with warnings.catch_warnings(action="ignore"):
            checkpoint.save(content, storage_writer=checkpoint.FileSystemWriter(partial_of(path)))
        finish_shares(path, digests_of_rank(partial_of(path), 0))
    assert newest_whole(tmp_path).path == newest and newest_whole(tmp_path).digest
    for file, step in ((".metadata", 3), (DIGESTS, 1), ("__0_0.distcp", 16)):
        whole = (newest / file).read_bytes()
        for place in range(0, len(whole), step):
            flipped = bytearray(whole)
            flipped[place] ^= 0xFF
            (newest / file).write_bytes(flipped)
            found = newest_whole(tmp_path)
            blank = file == DIGESTS and found.path == newest  # a space between two entries
            assert found.path == before or (blank and chr(whole[place]).isspace()), (file, place)
        (newest / file).write_bytes(whole)
    (newest / DIGESTS).unlink()
    assert newest_whole(tmp_path).path == newest and not newest_whole(tmp_path).digest, "of an older version"


class Runs:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_metadata_that_would_run_code_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Runs()))
    for read in (read_checkpoint, check_harmless):
        with pytest.raises(ValueError, match=r"builtins.print"):
            read(folder)
    assert "this ran" not in capsys.readouterr().out


def test_value_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(action="ignore"):
        checkpoint.save({"x": Runs()}, storage_writer=checkpoint.FileSystemWriter(tmp_path / "shares"))
    with pytest.raises(ValueError, match=r"print"):
        check_harmless(tmp_path / "shares")
    assert "this ran" not in capsys.readouterr().out


def test_share_outside_of_the_folder_is_refused(folder: Path) -> None:
    index: Metadata = pickle.loads((folder / ".metadata").read_bytes())  # just written by this test
    for info in index.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="no plain file of this folder"):
        read_checkpoint(folder)


def test_shares_need_fsdp2() -> None:
    with pytest.raises(ConfigError, match="run.sharded_checkpoints must be false with run.parallelism=ddp"):
        Run(name="x", sharded_checkpoints=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_with_shares_resumes_bit_for_bit_and_exports_as_one_with_files(tmp_path: Path) -> None:
    fsdp2, shares = "run.parallelism=fsdp2", "run.sharded_checkpoints=true"

    def run(name: str, *more: str) -> list[str]:
        return [CONVIT, *overrides(tmp_path, name, STEPS, fsdp2, *more)]

    recompute = "run.activation_checkpointing=1"  # which changes no bit either
    resumed_run = [run("resumed", shares, f"{STOP}7"), run("resumed", shares, recompute)]
    train_on(2, [run("file"), run("shares", shares), *resumed_run], tmp_path)
    file, whole, resumed = (
        read_checkpoint(tmp_path / name / "checkpoints/latest-rank0.pt") for name in ("file", "shares", "resumed")
    )
    assert len(losses(tmp_path / "shares")) == STEPS
    assert losses(tmp_path / "resumed") == losses(tmp_path / "shares") == losses(tmp_path / "file")
    for other in (file, resumed):
        for part in ("model", "optimizers"):
            assert assert_close(whole["state"][part], other["state"][part], 0.0, part) > 20
        assert assert_close(averaged_weights(whole), averaged_weights(other), 0.0) > 20
    networks = [load_trained(tmp_path / name).network.state_dict() for name in ("file", "shares")]
    assert assert_close(*networks, 0.0) > 20
    named = load_trained(tmp_path / "shares/checkpoints" / f"ep0-ba{STEPS // 2}-rank0.pt", weights="ema")
    assert named.averaged
    shutil.rmtree(tmp_path / "resumed/checkpoints" / f"ep0-ba{STEPS}-rank0.pt")  # as if it was torn
    train_on(2, [run("resumed", shares)], tmp_path)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "shares")
    assert json.loads((tmp_path / "resumed/summary.json").read_text())["finished"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shares_of_two_ranks_go_on_with_three(tmp_path: Path) -> None:
    def run(name: str, *more: str) -> list[str]:
        return [CONVIT, *overrides(tmp_path, name, STEPS, "global_train_batch_size=12", *more)]

    shares = ["run.parallelism=fsdp2", "run.sharded_checkpoints=true"]
    train_on(2, [run("whole"), run("shares", *shares, f"{STOP}7")], tmp_path)
    assert "Saved by 2 ranks, goes on with 3" in train_on(3, [run("shares", *shares)], tmp_path)
    assert losses(tmp_path / "shares") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
