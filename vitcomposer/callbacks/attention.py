"""Logs how far attention reaches and how positional it is while a network trains (arXiv:2103.10697, section 4)."""

from collections.abc import Callable

import torch
from composer.core import Callback, Event, State, Time, get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler
from torch import Tensor, nn

from vitcomposer.callbacks.throughput import as_evaluation
from vitcomposer.data.augment.transforms import EvalTransform
from vitcomposer.data.collate import EvalCollate
from vitcomposer.data.evaluation import ChosenSamples, Statistics, choose_samples
from vitcomposer.data.loader import source_of
from vitcomposer.data.mds.stream import ImageStream
from vitcomposer.data.synthetic import SyntheticImages
from vitcomposer.errors import require
from vitcomposer.models.attention import BlockAttention, has_attention, nonlocality, observe_attention
from vitcomposer.schema.recipe import Recipe

IMAGES = 16


class AttentionMonitor(Callback):
    """Measures the attention of a network on the same few images, without an effect on its training.

    Measures before the first step, every ``interval`` and at the end of training, in evaluation mode and with the
    weights that are being trained, not their average. Logs ``attention/nonlocality/layer<i>``, in patches, and for the
    gated layers of a ConViT ``attention/gate/layer<i>/head<j>``; layers and heads count from 1. Every rank measures all
    of the images, which under FSDP2 they have to do together.

    Args:
        network: The transformer; as a module, so that its name in a task does not matter.
        read_images: Gives the images (B, 3, H, W), normalised, on the CPU; called once, when training starts.
        interval: Composer time string.
    """

    def __init__(self, network: nn.Module, read_images: Callable[[], Tensor], *, interval: str) -> None:
        self.network, self.read_images = network, read_images
        self._due = create_interval_scheduler(
            interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
        )
        self._max_duration: Time | None = None
        self._measured_at = -1

    def fit_start(self, state: State, logger: Logger) -> None:
        self._max_duration = state.max_duration
        self._images = state.device.tensor_to_device(self.read_images())
        if state.timestamp.batch == 0:
            self._measure(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._measure_if_due(state, logger, Event.BATCH_END)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._measure_if_due(state, logger, Event.EPOCH_END)

    def _measure_if_due(self, state: State, logger: Logger, event: Event) -> None:
        # By a signal: the scheduler grants no time for this. Composer cannot compare a step with an epoch.
        stopped = state.max_duration is not self._max_duration
        if not stopped and self._measured_at != state.timestamp.batch.value and self._due(state, event):
            self._measure(state, logger)

    def _measure(self, state: State, logger: Logger) -> None:
        self._measured_at = state.timestamp.batch.value
        # Not compiled: the hooks that look at a block take no part in a graph.
        with (
            as_evaluation(state),
            get_precision_context(state.precision),
            torch.compiler.set_stance("force_eager"),
        ):
            layers = observe_attention(self.network, self._images, _measure_block)
        found = {}
        for layer, (distance, gate) in enumerate(layers, start=1):
            found[f"attention/nonlocality/layer{layer}"] = float(distance)
            for head, share in enumerate([] if gate is None else gate.tolist(), start=1):
                found[f"attention/gate/layer{layer}/head{head}"] = share
        logger.log_metrics(found)


def _measure_block(attention: BlockAttention) -> tuple[Tensor, Tensor | None]:
    """Non-locality, mean over the heads, and the gate of each head."""
    gate = attention.gate
    return nonlocality(attention).mean(), None if gate is None else gate.clone()


def build_attention_monitor(
    cfg: Recipe, network: nn.Module, images: ImageStream | SyntheticImages, *, mean: Statistics, std: Statistics
) -> list[Callback]:
    """The monitor of ``run.attention_interval``, on images drawn by ``seed``; none where it is null.

    Args:
        images: Of the validation split; their order and position stay where they are.

    Raises:
        ConfigError: A network without attention.
    """
    interval = cfg.run.attention_interval
    if interval is None:
        return []
    rule = f"null for {cfg.model.name}, which has no attention over all tokens"
    require(has_attention(network), "run.attention_interval", rule, interval, "Leave it out.")
    collate = EvalCollate(
        image_size=cfg.evaluation.image_size or cfg.model.image_size,
        crop_ratio=cfg.evaluation.crop_ratio,
        interpolation=cfg.evaluation.interpolation,
        num_classes=1 << 62,  # the labels are not looked at
        source=source_of(images),
    )
    transform = EvalTransform(mean, std)
    samples = ChosenSamples(images, choose_samples(images.num_samples, IMAGES, cfg.seed), IMAGES)
    return [AttentionMonitor(network, lambda: transform(collate(list(samples)))["image"], interval=interval)]
