"""The attention monitor measures what it says and leaves training as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from torch import Tensor
from torch.utils.data import DataLoader

from tests.callbacks import tiny_run
from tests.conftest import run_train, tiny_photo_overrides
from vitcomposer.callbacks import AttentionMonitor
from vitcomposer.models import build_model
from vitcomposer.models.attention import nonlocality, observe_attention

PICTURES = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(9))


class _Task(tiny_run.TinyTask):
    """A ConViT with dropout and a module that stays in evaluation mode on its own."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"patch_size": 1, "embed_dim": 16, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}
        rates = {"drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.2}
        self.model: Any = build_model("convit_tiny", num_classes=2, image_size=4, **options, **rates)

    def train(self, mode: bool = True) -> "_Task":
        super().train(mode)
        self.model.blocks[1].eval()
        return self


class _Curve(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.modes: list[tuple[bool, ...]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, Tensor)
        self.losses.append(float(state.loss))
        self.modes.append(tuple(module.training for module in state.model.modules()))


class _Log(LoggerDestination):
    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("attention/") for key in metrics):
            assert step is not None
            self.seen[step] = metrics


def tiny_training(monitored: bool) -> tuple[_Task, _Curve, _Log]:
    """Eight steps whose dropout draws from the global generator, in order: no seed per step hides a draw too many."""
    task, curve, log = _Task(), _Curve(), _Log()
    monitor = AttentionMonitor(task.model, lambda: PICTURES, interval="3ba")
    trainer = Trainer(
        model=task,
        train_dataloader=DataLoader(tiny_run.Images(), batch_size=tiny_run.BATCH, generator=torch.Generator()),
        optimizers=torch.optim.AdamW(task.parameters(), lr=1e-2),
        callbacks=[*([monitor] if monitored else []), curve],
        loggers=[log],
        max_duration="2ep",
        device="cpu",
        seed=0,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return task, curve, log


def test_monitor_leaves_the_loss_curve_bitwise_unchanged_and_logs_what_is_there() -> None:
    (_, without, nothing), (task, with_it, log) = tiny_training(False), tiny_training(True)
    assert with_it.losses == without.losses and len(set(without.losses)) == 8
    assert with_it.modes == without.modes and True in with_it.modes[-1] and False in with_it.modes[-1]
    assert nothing.seen == {} and list(log.seen) == [0, 3, 6, 8]
    layers = [f"attention/nonlocality/layer{layer}" for layer in (1, 2, 3)]
    gates = [f"attention/gate/layer{layer}/head{head}" for layer in (1, 2) for head in (1, 2, 3, 4)]
    assert sorted(log.seen[0]) == sorted(layers + gates)
    assert all(log.seen[0][gate] == pytest.approx(0.7310586) for gate in gates)
    blocks = observe_attention(task.model, PICTURES, lambda block: block)
    for layer, block in zip(layers, blocks, strict=True):
        assert log.seen[8][layer] == pytest.approx(nonlocality(block).mean().item())
    assert blocks[1].gate is not None and log.seen[8][gates[6]] == pytest.approx(blocks[1].gate[2].item())
    assert log.seen[8] != log.seen[6] != log.seen[3]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_run_is_the_same_with_the_key_of_the_yaml(photo_mds: Path, tmp_path: Path) -> None:
    lines = {}
    for name, interval in (("without", "null"), ("with", "2ba")):
        argv = [
            "yamls/deit_ti.yaml",
            *tiny_photo_overrides(photo_mds, tmp_path, name),
            f"run.attention_interval={interval}",
        ]
        assert run_train([*argv, "max_duration=4ba", "run.progress_bar=false"]) == 0
        lines[name] = metrics_of(tmp_path / name)
    losses = {name: [line.get("loss/train/total") for line in found if line["step"]] for name, found in lines.items()}
    assert losses["with"] == losses["without"] and len(losses["with"]) == 4
    reach = {line["step"]: line.get("attention/nonlocality/layer2") for line in lines["with"]}
    assert [step for step, value in reach.items() if value is not None] == [0, 2, 4]
    assert not any(key.startswith("attention/") for line in lines["without"] for key in line)


def test_network_without_attention_is_refused(
    photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"data.local={photo_mds}", "data.num_workers=0", f"run.folder={tmp_path}", "run.attention_interval=1ep"]
    options = ["precision=fp32", "model.num_classes=8", "global_train_batch_size=16", "model.drop_path_rate=0"]
    assert run_train(["yamls/deit_ti.yaml", *data, *options, "model.name=resnet50"]) == 2
    assert "run.attention_interval must be null for resnet50, which has no attention" in capsys.readouterr().err
    assert run_train(["yamls/probe_linear.yaml", *data, *options[1:3]]) == 2
    assert "run.attention_interval must be null for a trunk that does not learn" in capsys.readouterr().err
