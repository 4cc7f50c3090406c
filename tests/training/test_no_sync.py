"""What a training step reads back to the host, and with it, where a GPU would have to wait for the host."""

import traceback
from pathlib import Path

import pytest
import torch
from composer import Callback, Trainer
from composer.core import DataSpec
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from vitcomposer import losses
from vitcomposer.algorithms import build_algorithms
from vitcomposer.callbacks import NumericsMonitor, Preemption, StepSeed, Throughput
from vitcomposer.models import build_model
from vitcomposer.optim import build_optimizer
from vitcomposer.schema import Optimizer
from vitcomposer.tasks import ClassificationTask

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item(), int(), bool()
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
}
# Composer 0.32 reads by itself: before the forward pass the images in the batch of all ranks; after backward and
# clipping the loss, for the closure that every optimizer gets; and, once the optimizer has stepped, the loss again for
# the loggers and three times of the step.
COMPOSERS_OWN = 6


class Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[traceback.StackSummary] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.found.append(traceback.extract_stack()[:-1])
        return func(*args, **(kwargs or {}))

    def callers(self) -> list[str]:
        """The file of Python code outside torch that asked, for every read."""
        files = ([frame.filename for frame in stack if "/torch/" not in frame.filename] for stack in self.found)
        return ["/".join(Path(names[-1]).parts[-3:]) for names in files]


class WatchStep(Callback):
    """Watches every step from the start of its batch to the callbacks at its end."""

    def __init__(self) -> None:
        self.reads = Reads()

    def batch_start(self, state, logger):
        self.reads.__enter__()

    def batch_end(self, state, logger):
        self.reads.__exit__(None, None, None)


class Batches(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        target = torch.softmax(torch.randn(4, 5, generator=generator), dim=1)
        return {"image": torch.randn(4, 3, 16, 16, generator=generator), "target": target, "label": target.argmax(1)}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_schedulefree"])
@pytest.mark.parametrize("clipping", ["norm", "norm_per_parameter", "value", "adaptive"])
def test_step_reads_back_only_what_composer_reads(optimizer: str, clipping: str) -> None:
    model = build_model(
        "deit_tiny_distilled_patch16", num_classes=5, image_size=16, patch_size=8, depth=2, drop_path_rate=0.5
    )
    algorithms = {
        "GradientClipping": {"clipping_type": clipping, "clipping_threshold": 0.1},
        "EMA": {"half_life": "2ba", "update_interval": "1ba"},
    }
    watch = WatchStep()
    config = Optimizer(name=optimizer, lr=1e-3, lr_batch_size=4, lr_scaling="none", weight_decay=0.05)
    built = build_optimizer(model, config, global_train_batch_size=4)
    if optimizer == "adamw_schedulefree":
        built.train()  # pyright: ignore[reportAttributeAccessIssue]
    train = DataSpec(DataLoader(Batches(), batch_size=None))
    numbers = NumericsMonitor(train, seed=0, latest=Path("none"), skip_steps=1)
    trainer = Trainer(
        model=ClassificationTask(model, loss=losses.soft_target_cross_entropy, num_classes=5),
        train_dataloader=train,
        max_duration="3ba",
        optimizers=built,
        algorithms=build_algorithms(
            algorithms, loss="soft_target_cross_entropy", precision="fp32", label_smoothing=0.0
        ),
        callbacks=[watch, Throughput(None, "fp32"), Preemption(), StepSeed(0), numbers],
        device="cpu",
        device_train_microbatch_size=4,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    assert watch.reads.callers() == ["composer/trainer/trainer.py"] * COMPOSERS_OWN * 3


def test_the_watch_sees_a_read() -> None:
    reads = Reads()
    with reads:
        torch.ones(3).sum().item()
        bool(torch.ones(1) > 0)
    assert len(reads.callers()) == 2 and all(
        name.endswith("tests/training/test_no_sync.py") for name in reads.callers()
    )
