"""A run small enough for tests: 32 images of two classes, batches of 8, four steps an epoch, the real Trainer.

As a script, ``tiny_run.py FOLDER MAX_DURATION SECONDS_PER_STEP WORKERS``, it trains with autoresume. It says ``step N``
when N steps are done and the next begins, saves the weights it ends with and leaves with 143 or 130 after a signal.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Evaluator, Trainer
from composer.algorithms import EMA
from composer.core import DataSpec
from composer.metrics import CrossEntropy
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from vitcomposer.callbacks import Preemption

IMAGES = 32
STEPS_PER_EPOCH = 4
BATCH = IMAGES // STEPS_PER_EPOCH


class Images(Dataset):
    def __init__(self, seconds_per_image: float = 0.0) -> None:
        self.seconds_per_image = seconds_per_image

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.seconds_per_image)
        generator = torch.Generator().manual_seed(index)
        label = index % 2
        image = torch.randn(3, 4, 4, generator=generator) + label
        return {"image": image, "label": label, "target": nn.functional.one_hot(torch.tensor(label), 2).float()}


class TinyTask(ComposerModel):
    def __init__(self, seconds_per_step: float = 0.0, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 2))
        self.seconds_per_step = seconds_per_step
        self.fail_at = fail_at
        self.steps = 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if self.training:
            time.sleep(self.seconds_per_step)
            self.steps += 1
            if self.steps == self.fail_at:
                raise RuntimeError("the loss went away")
        return self.model(batch["image"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["target"])

    def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
        return {} if is_train else {"top1": MulticlassAccuracy(2, average="micro"), "loss": CrossEntropy()}

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Any) -> None:
        metric.update(outputs, batch["label"])


def build(
    max_duration: str,
    *,
    callbacks: list[Callback],
    loggers: list[Any] | None = None,
    eval_interval: str | int = "1ep",
    seconds_per_image: float = 0.0,
    seconds_per_step: float = 0.0,
    fail_at: int | None = None,
    ema: bool = False,
    workers: int = 0,
    **trainer_options: Any,
) -> Trainer:
    task = TinyTask(seconds_per_step, fail_at)
    ranks = dist.get_world_size()

    def loader(seconds: float) -> DataSpec:
        images = Images(seconds)
        sampler = dist.get_sampler(images, shuffle=False)
        return DataSpec(DataLoader(images, batch_size=BATCH // ranks, sampler=sampler, num_workers=workers))

    names = ["top1", "loss"]
    labels = ["eval", "ema"] if ema else ["eval"]
    evaluators = [
        Evaluator(label=label, dataloader=loader(0.0), metric_names=names, eval_interval=eval_interval)
        for label in labels
    ]
    return Trainer(
        model=task,
        train_dataloader=loader(seconds_per_image),
        eval_dataloader=evaluators,
        optimizers=torch.optim.AdamW(task.parameters(), lr=1e-2),
        algorithms=[EMA(half_life="2ba", update_interval="1ba")] if ema else [],
        callbacks=callbacks,
        loggers=loggers or [],
        max_duration=max_duration,
        device="cpu",
        progress_bar=False,
        seed=0,
        **trainer_options,
    )


class _Announce(Callback):
    def batch_start(self, state: Any, logger: Any) -> None:
        print(f"step {state.timestamp.batch.value}", flush=True)


def main(folder: Path, max_duration: str, seconds_per_step: float = 0.0, workers: int = 0) -> int:
    preemption = Preemption()
    trainer = build(
        max_duration,
        callbacks=[preemption, _Announce()],
        seconds_per_step=seconds_per_step,
        workers=workers,
        run_name="tiny",
        save_folder=str(folder / "checkpoints"),
        save_interval="100ep",
        save_overwrite=True,
        autoresume=True,
    )
    print(f"resumed at {trainer.state.timestamp.batch.value}", flush=True)
    trainer.fit()
    trainer.close()
    if dist.get_global_rank() == 0:
        torch.save(trainer.state.model.state_dict(), folder / "weights.pt")
    return preemption.status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
