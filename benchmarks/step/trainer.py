"""The Trainer of a recipe over one batch in memory, for benchmarks.step."""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from composer import Callback, State, Trainer
from composer.core import DataSpec
from composer.loggers import Logger
from torch import Tensor, nn

from vitcomposer import config, losses, optim
from vitcomposer.cost.flops import train_flops
from vitcomposer.foundations import forget_engine
from vitcomposer.tasks import ClassificationTask
from vitcomposer.training.network import build_network
from vitcomposer.training.setup import prepare
from vitcomposer.training.trainer import build_trainer

NEVER = "1000000ba"


class StepClock(Callback):
    """CPU seconds, or elapsed ones on a GPU, from the end of a step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() if torch.cuda.is_available() else time.process_time())


class TrainerSteps:
    """A recipe's Trainer that goes on by a few steps at a time over the same batch.

    Args:
        more: Further ``key=value`` of the recipe, its precision among them; without one, that of the device.

    Attributes:
        targets: Soft targets (batch, classes) that it learns from.
    """

    def __init__(  # noqa: PLR0913
        self, yaml: Path, model: str, images: Tensor, labels: Tensor, folder: Path, more: Sequence[str] = ()
    ) -> None:
        batch = len(images)
        overrides = [f"model.name={model}", "model.drop_path_rate=0", f"global_train_batch_size={batch}"]
        overrides += [f"max_duration={NEVER}", "schedule.t_warmup=1ba", "algorithms={}", f"data.local={folder}"]
        overrides += [f"run.folder={folder}", "run.name=step", f"run.save_interval={NEVER}", "run.progress_bar=false"]
        if not any(each.startswith("precision=") for each in more):
            overrides.append(f"precision={'amp_bf16' if images.is_cuda else 'fp32'}")
        cfg = config.load(yaml, [*overrides, *more])
        cfg, share = prepare(cfg)
        network = build_network(cfg.model, cfg.init)
        self.targets = F.one_hot(labels, cfg.model.num_classes).float()
        batches = [{"image": images, "label": labels, "target": self.targets}] * 1000
        self._clock = StepClock()
        flops = train_flops(network, cfg.model.image_size)
        self._trainer: Trainer = build_trainer(
            cfg,
            share,
            task=ClassificationTask(network, loss=losses.soft_target_cross_entropy, num_classes=cfg.model.num_classes),
            train=DataSpec(batches, get_num_samples_in_batch=lambda _: batch),
            evaluators=[],
            optimizer=optim.build_optimizer(network, cfg.optimizer, global_train_batch_size=batch),
            algorithms=[],
            train_flops_per_image=lambda step: flops,
            callbacks=[self._clock],
        )
        self.run(2)

    @staticmethod
    def loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """What the bare loop computes: the loss of the recipe."""
        return losses.soft_target_cross_entropy(model(images), targets)

    def run(self, steps: int) -> list[float]:
        """Train that many steps; seconds of all but the first, which carries what a fit costs once."""
        self._clock.ends.clear()
        self._trainer.fit(duration=f"{steps}ba")
        ends = self._clock.ends
        return [after - before for before, after in pairwise(ends)]

    @property
    def microbatch(self) -> int | float | None:
        """Images that go through the network at once."""
        return self._trainer.state.device_train_microbatch_size

    def close(self) -> None:
        """End the run, and free what it held."""
        self._trainer.close()
        forget_engine(self._trainer)
