"""Networks of timm whose weights two ranks share (FSDP2), with recomputed blocks: losses as with whole weights."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.parallel.ranks import train_on
from tests.training.test_train import losses, weights
from tests.trunks.networks import _RUN
from tests.trunks.test_trunks import BY_NAME

NETWORKS = ("vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224")


@pytest.mark.slow
def test_shared_weights_train_as_whole_ones_do(tmp_path: Path) -> None:
    runs = []
    for name in NETWORKS:
        page = [str(ROOT / "yamls/finetune_photos.yaml"), *BY_NAME[name].overrides, *_RUN, f"run.folder={tmp_path}"]
        page += ["algorithms={}", "max_duration=4ba", "run.eval_interval=4ba", "model.drop_path_rate=0"]
        runs.append([*page, f"run.name={name}_ddp"])
        shared = ["run.parallelism=fsdp2", "run.activation_checkpointing=1"]
        runs.append([*page, f"run.name={name}_fsdp2", *shared])
    train_on(2, runs, tmp_path)
    for name in NETWORKS:
        ddp, fsdp2 = (tmp_path / f"{name}_{kind}" for kind in ("ddp", "fsdp2"))
        assert len(losses(ddp)) == 4 and losses(fsdp2) == pytest.approx(losses(ddp), rel=1e-4)
        whole, shared = weights(ddp), weights(fsdp2)
        assert whole.keys() == shared.keys()
        assert all(tensor.shape == shared[key].shape for key, tensor in whole.items())
