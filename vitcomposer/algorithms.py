"""Which of Composer's algorithms a yaml may name, checked and built; with the changes that two of them need here.

Every public algorithm of Composer stands in exactly one of two tables: ``ALLOWED``, shown by a test to work on a ViT
with our batches, or ``REJECTED``, with the reason and what to use instead.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.algorithms import EMA, SAM, CutOut, GradientClipping, LabelSmoothing, LowPrecisionLayerNorm
from composer.algorithms.ema.ema import EMAParameters
from composer.algorithms.sam.sam import SAMOptimizer
from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vitcomposer.schema import ConfigError, did_you_mean, require

EMA_LABEL = "ema"  # the Evaluator that measures the averaged weights


class EvaluationEMA(EMA):
    """Composer's moving average of the weights, seen only by the Evaluator labelled ``ema``.

    Composer's EMA swaps the average into the model for every evaluation and every checkpoint, and leaves it there until
    the next batch starts. Here the model always holds the raw weights, in training, in checkpoints and after ``fit``;
    only between the start and the end of the evaluation labelled ``ema`` does it hold the average. So ``eval`` measures
    the raw weights, ``ema`` the averaged ones, and a checkpoint has the raw weights in its model and the average in the
    state of this algorithm (:func:`averaged_weights` reads it). Before ``ema_start`` both are the same.

    The average starts as a copy of the weights after the first batch (or epoch, by ``update_interval``) at or after
    ``ema_start``, then ``average <- smoothing * average + (1 - smoothing) * weights`` every ``update_interval``.
    Floating-point buffers are averaged too; integer buffers, which Composer's EMA rounds down, are copied. Names are
    those of the model without its DDP wrapper, so a run can be resumed on another number of ranks.

    Args:
        half_life: Time string in ep or ba; with ``update_interval`` it gives
            ``smoothing = 2 ** (-update_interval / half_life)``.
        smoothing: In (0, 1), instead of ``half_life``: DeiT's ``decay``, 0.99996 per batch.
        ema_start: Time string in dur, ep or ba.
        update_interval: Time string in ep or ba, in the units of ``half_life``; required with ``smoothing``.

    Raises:
        ValueError: Not exactly one of ``half_life`` and ``smoothing``, or a value out of its range.
    """

    def __init__(
        self,
        half_life: str | None = None,
        smoothing: float | None = None,
        ema_start: str = "0.0dur",
        update_interval: str | None = None,
    ) -> None:
        if (half_life is None) == (smoothing is None):
            raise ValueError(f"set exactly one of half_life and smoothing, got {half_life!r} and {smoothing!r}")
        if smoothing is not None and not 0 < smoothing < 1:
            raise ValueError(f"smoothing must be in (0, 1), got {smoothing}")
        if smoothing is not None and update_interval is None:
            raise ValueError("smoothing needs update_interval, the time it is meant for, such as 1ba")
        for text in (half_life, update_interval):
            if text is not None and Time.from_timestring(text).value <= 0:
                raise ValueError(f"half_life and update_interval must be above 0, got {text!r}")
        super().__init__(half_life, smoothing, ema_start, update_interval)
        if self.ema_start.unit not in (TimeUnit.DURATION, TimeUnit.EPOCH, TimeUnit.BATCH):
            raise ValueError(f"ema_start must be in dur, ep or ba, got {ema_start!r}")

    def match(self, event: Event, state: State) -> bool:
        if event == self.update_event:
            return self.ema_started or self._should_start(state)
        return event in (Event.INIT, Event.FIT_START, Event.BATCH_START, Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        model = _without_ddp(state.model)
        if event == Event.INIT:
            self.ema_model = EMAParameters(model)  # a checkpoint loads into it
            return
        assert self.ema_model is not None, "Event.INIT runs before every other event"
        # A loaded average lies where the checkpoint was read to.
        if event in (Event.FIT_START, Event.EVAL_START):
            self.ema_model.move_params_to_device(destination_model=model)
        averaged = event == Event.EVAL_START and state.dataloader_label == EMA_LABEL and self.ema_started
        if averaged != self.ema_weights_active:
            self.ema_model.swap_params(model)
            self.ema_weights_active = averaged
        if event == self.update_event:
            self._update(model, state)

    @torch.no_grad()
    def _update(self, model: nn.Module, state: State) -> None:
        if not self.ema_started:
            self.ema_model = EMAParameters(model)
            self.ema_started = True
        elif state.timestamp.get(self.update_interval.unit).value % self.update_interval.value == 0:
            assert isinstance(self.ema_model, EMAParameters) and self.smoothing is not None
            average = {**self.ema_model.named_parameters_dict, **self.ema_model.named_buffers_dict}
            current = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            floating = [name for name in average if average[name].is_floating_point()]
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                [average[name] for name in floating], [current[name] for name in floating], 1 - self.smoothing
            )
            for name in average.keys() - set(floating):
                average[name].copy_(current[name])


def averaged_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The averaged weights and buffers of a loaded Composer checkpoint, by the names in its ``state.model``.

    Raises:
        ValueError: The run had no EMA, or the average had not started.
    """
    states = dict(checkpoint["state"]["algorithms"])
    ema = states.get(EvaluationEMA.__qualname__)
    if ema is None or not ema["ema_started"]:
        why = f"holds {sorted(states)}" if ema is None else "was saved before ema_start"
        raise ValueError(f"The checkpoint must hold a started EMA, but it {why}. Evaluate its raw weights instead.")
    average = {**ema["ema_model"]["named_parameters_dict"], **ema["ema_model"]["named_buffers_dict"]}
    # Frozen parameters are not averaged, and buffers that are not saved have no place in a state dict.
    return {name: average.get(name, raw) for name, raw in checkpoint["state"]["model"].items()}


def _without_ddp(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


class ResumableSAM(SAM):
    """Composer's sharpness-aware minimization (arXiv:2010.01412), with checkpoints that can be resumed.

    Composer's wrapper saves its own perturbation and not the moments of the optimizer it wraps, so a resumed run starts
    them at zero. Here a checkpoint holds the wrapped optimizer, as if there were no SAM, and the count of steps follows
    the batch, so resuming on as many ranks is exact. Every ``interval``-th step costs two forward and backward passes.
    """

    def __init__(self, rho: float = 0.05, epsilon: float = 1e-12, interval: int = 1) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="SAM has known issues")  # the one that this class mends
            super().__init__(rho, epsilon, interval)

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        (optimizer,) = state.optimizers
        super().apply(event, state, logger)  # for the gradient scaler that can call the closure twice
        # Composer files an optimizer under its class name, and this event comes after the load into the plain one.
        name = type(optimizer).__qualname__
        cls = type(name, (_SAMOptimizer,), {"__qualname__": name})
        wrapped = cls(optimizer, rho=self.rho, epsilon=self.epsilon, interval=self.interval)
        wrapped.global_step = int(state.timestamp.batch)
        state.optimizers = (wrapped,)


class _SAMOptimizer(SAMOptimizer):
    """Returns from the climb to the very weights it left, where Composer's subtracts the perturbation again.

    Ranks climb along their own gradients, so what that subtraction rounds off would let their weights drift apart.
    """

    def __init__(self, base_optimizer: Optimizer, **options: Any) -> None:
        super().__init__(base_optimizer, **options)
        # Saving an optimizer with an empty state makes torch take a trial step, which SAM cannot without a closure.
        for parameter in self._parameters():
            self.state[parameter]["weight"] = parameter.detach().clone()

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self._parameters():
            self.state[parameter]["weight"].copy_(parameter)
        super().first_step()
        for parameter in self._parameters():
            self.state[parameter].pop("e_w", None)

    @torch.no_grad()
    def sub_e_w(self) -> None:
        for parameter in self._parameters():
            parameter.copy_(self.state[parameter]["weight"])

    @torch.no_grad()
    def second_step(self) -> None:
        self.sub_e_w()
        self.base_optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()


# Arguments that are ours to give: where a batch keeps images and targets, and when the layers are replaced.
ALLOWED: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "CutOut": (CutOut, {"input_key": "image"}),  # one square for the whole device batch, black before normalisation
    "EMA": (EvaluationEMA, {}),
    "GradientClipping": (GradientClipping, {}),
    "LabelSmoothing": (LabelSmoothing, {"target_key": "target"}),
    "LowPrecisionLayerNorm": (LowPrecisionLayerNorm, {"apply_at": Event.INIT}),
    "SAM": (ResumableSAM, {}),
}

_NO_CONVOLUTIONS = "changes convolutional networks, and a ViT has one convolution. Leave it out."
_LANGUAGE = "is made for language models. Leave it out."
REJECTED: dict[str, str] = {
    "Alibi": _LANGUAGE,
    "AugMix": "needs PIL images of a torchvision data set. Use augment.rand_augment or augment.three_augment.",
    "BlurPool": _NO_CONVOLUTIONS,
    "ChannelsLast": "gains nothing on a ViT, whose patch embedding is one matrix product. Leave it out.",
    "ColOut": "leaves image sizes that are no multiple of the patch. Use augment.crop_scale.",
    "CutMix": "mixes every batch and knows no switch with mixup. Use mixing.cutmix_alpha and mixing.switch_prob.",
    "Factorize": "replaces trained layers by low-rank ones, at a loss of accuracy. Choose a smaller model.name.",
    "GatedLinearUnits": _LANGUAGE,
    "GhostBatchNorm": "needs batch norms, and a ViT has layer norms. Leave it out.",
    "GyroDropout": "replaces dropout, which these recipes have at 0, and cannot be resumed. Use model.drop_path_rate.",
    "LayerFreezing": "saves nothing on a ViT, since backward still crosses every block. Leave it out.",
    "LowPrecisionGroupNorm": "needs group norms, and a ViT has layer norms. Use LowPrecisionLayerNorm.",
    "MixUp": "mixes every batch and knows no switch with CutMix. Use mixing.mixup_alpha and mixing.switch_prob.",
    "NoOpModel": "replaces the model by one parameter, for timing. Use vitcomposer bench.",
    "ProgressiveResizing": "resizes by nearest neighbour to sizes off the patch grid. Train at a smaller "
    "model.image_size and fine-tune.",
    "RandAugment": "needs PIL images of a torchvision data set. Use augment.rand_augment.",
    "SWA": "cannot be resumed on several GPUs once the average has started. Use EMA, which averages too.",
    "SelectiveBackprop": "takes batches of (image, target) pairs and scores them before augmentation. Leave it out.",
    "SeqLengthWarmup": _LANGUAGE,
    "SqueezeExcite": _NO_CONVOLUTIONS,
    "StochasticDepth": "knows ResNet bottlenecks only and does nothing to a ViT. Use model.drop_path_rate.",
    "WeightStandardization": _NO_CONVOLUTIONS,
}

_Rule = tuple[Callable[[Any], bool], str, str]
# What Composer's classes do not check, or only in the middle of the first batch.
_RULES: dict[str, dict[str, _Rule]] = {
    "CutOut": {
        "num_holes": (lambda v: v >= 1, "1 or more", "Use 1."),
        "length": (lambda v: 0 < v < 1, "in (0, 1)", "It is a share of the image's side; use 0.5."),
    },
    "GradientClipping": {
        "clipping_type": (lambda v: v in ("norm", "value", "adaptive"), "norm, value or adaptive", "Use norm."),
        "clipping_threshold": (lambda v: v > 0, "above 0", "Use 1.0 with norm."),
    },
    "LabelSmoothing": {"smoothing": (lambda v: 0 <= v < 1, "in [0, 1)", "Use 0.1.")},
    "SAM": {
        "rho": (lambda v: v > 0, "above 0", "Use 0.05."),
        "interval": (lambda v: v >= 1, "1 or more", "Use 1; 10 costs a tenth as much."),
    },
}


def build_algorithms(
    algorithms: Mapping[str, Mapping[str, Any]], *, loss: str, precision: str, label_smoothing: float
) -> list[Algorithm]:
    """Composer algorithms from the ``algorithms`` block of a yaml, in its order.

    Args:
        algorithms: Name to arguments; the keys of our batches are filled in.
        loss: ``loss`` of the recipe.
        precision: ``precision`` of the recipe.
        label_smoothing: What is already smoothed while mixing.

    Raises:
        ConfigError: A name or argument that is unknown, unfit for a ViT, or at odds with the three values above.
    """
    built = [_build(name, dict(arguments)) for name, arguments in algorithms.items()]
    if "LabelSmoothing" in algorithms:
        remedy = "Drop one of the two, or the targets are smoothed twice."
        require(
            label_smoothing == 0, "mixing.label_smoothing", "0 with algorithms.LabelSmoothing", label_smoothing, remedy
        )
        remedy = "Smoothed targets are all above 0, which this loss takes for present. Drop algorithms.LabelSmoothing."
        require(loss != "binary_cross_entropy", "loss", "a cross-entropy with algorithms.LabelSmoothing", loss, remedy)
    if "LowPrecisionLayerNorm" in algorithms:
        remedy = "It does nothing in fp32. Drop algorithms.LowPrecisionLayerNorm."
        require(precision != "fp32", "precision", "mixed with algorithms.LowPrecisionLayerNorm", precision, remedy)
    return built


def _build(name: str, arguments: dict[str, Any]) -> Algorithm:
    key = f"algorithms.{name}"
    if name in REJECTED:
        raise ConfigError(f"{key} must be an algorithm that helps a ViT, but {name} {REJECTED[name]}")
    if name not in ALLOWED:
        hint = did_you_mean(name, [*ALLOWED, *REJECTED])
        raise ConfigError(f"{key} must be one of {sorted(ALLOWED)}.{hint} Mend the name.")
    cls, ours = ALLOWED[name]
    allowed = [argument for argument in inspect.signature(cls).parameters if argument not in ours]
    for argument in arguments:
        if argument not in allowed:
            hint = did_you_mean(argument, allowed)
            raise ConfigError(f"{key}.{argument} must be one of the arguments {allowed}.{hint} Mend the name.")
    try:
        for argument, (holds, rule, remedy) in _RULES.get(name, {}).items():
            if argument in arguments:
                require(holds(arguments[argument]), f"{key}.{argument}", rule, arguments[argument], remedy)
        return cls(**arguments, **ours)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} must be arguments that {name} accepts, got {arguments}. It says: {error}") from error
