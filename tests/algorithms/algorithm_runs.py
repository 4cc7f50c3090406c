"""A tiny ViT, its images and short runs for the tests of algorithms."""

import torch
from composer import Callback, Trainer
from composer.core import Algorithm, DataSpec
from composer.models import ComposerModel
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from vitcomposer.algorithms import (
    build_algorithms,
)

CLASSES, SIDE, BATCH, BATCHES = 5, 16, 4, 3  # images per step, steps per epoch
PLAIN = {"loss": "soft_target_cross_entropy", "precision": "fp32", "label_smoothing": 0.0}


class Images(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH * BATCHES, 3, SIDE, SIDE)
        self.images = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": torch.tensor(index % CLASSES), "sample_id": torch.tensor(index)}


def to_device_side(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    target = nn.functional.one_hot(batch["label"], CLASSES).float()
    return {**batch, "image": batch["image"].float() / 255 - 0.5, "target": target}


def data_spec() -> DataSpec:
    return DataSpec(DataLoader(Images(), batch_size=BATCH), microbatch_transforms=to_device_side)


class Task(ComposerModel):
    """A ViT of two blocks that keeps what it was given; ``steps`` is an integer buffer that counts forwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = VisionTransformer(
            img_size=SIDE, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES
        )
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("positions", torch.arange(1000))
        self.images: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []

    def forward(self, batch):
        if self.training:
            self.steps += 1
            self.images.append(batch["image"].clone())
        return self.model(batch["image"])

    def loss(self, outputs, batch, *args, **kwargs):
        self.targets.append(batch["target"].clone())
        return nn.functional.cross_entropy(outputs, batch["target"])

    def get_metrics(self, is_train=False):
        return {} if is_train else {"weight": MeanMetric()}

    def update_metric(self, batch, outputs, metric):
        metric.update(self.model.head.weight.sum())


class Record(Callback):
    """Gradients before each step, and a copy of the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def after_train_batch(self, state, logger):
        self.gradients.append([p.grad.clone() for p in state.model.parameters()])

    def batch_end(self, state, logger):
        self.weights.append({name: p.detach().clone() for name, p in state.model.named_parameters()})


def build(name: str, **arguments) -> list[Algorithm]:
    return build_algorithms({name: arguments}, **PLAIN)


def adamw(task: Task, lr: float = 1e-2) -> torch.optim.AdamW:
    decayed, exempt = ([p for p in task.parameters() if (p.ndim > 1) == decay] for decay in (True, False))
    return torch.optim.AdamW([{"params": decayed}, {"params": exempt, "weight_decay": 0.0}], lr=lr)


def fit(
    algorithms: list[Algorithm], max_duration: str = "3ba", lr: float = 1e-2, **options
) -> tuple[Trainer, Task, Record]:
    task, record = Task(), Record()
    settings = {"device": "cpu", "seed": 1, "progress_bar": False, "callbacks": []} | options
    settings["callbacks"] = [record, *settings["callbacks"]]
    trainer = Trainer(
        model=task,
        train_dataloader=data_spec(),
        max_duration=max_duration,
        optimizers=adamw(task, lr),
        algorithms=algorithms,
        **settings,
    )
    trainer.fit()
    trainer.close()
    return trainer, task, record


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def checkpointed(tmp_path, every: str = "1ba") -> dict:
    return {"save_folder": str(tmp_path), "save_interval": every, "save_filename": "ba{batch}.pt"}
