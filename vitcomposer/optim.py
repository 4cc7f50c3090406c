"""Builds parameter groups, optimizers by name (torch's, then timm's) and the learning-rate schedule."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import timm.optim
import torch
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.optim import Optimizer

from vitcomposer import schema
from vitcomposer.errors import ConfigError, did_you_mean, require
from vitcomposer.schema.times import parse_time

if TYPE_CHECKING:  # importing Composer costs seconds, and building an optimizer does not need it
    from composer.core import State

OUR_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adamw_schedulefree": AdamWScheduleFree,
}
timm_optim: Any = timm.optim  # it does not declare what it exports


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_weight_decay: Sequence[str] | None = None,
    decay_all: bool = False,
    layer_lrs: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with ``weight_decay`` and, ``weight_decay: 0``, without.

    Without are one-dimensional parameters (norms, gates), everything named ``bias`` and what the model lists in
    ``no_weight_decay()``: the rule of DeiT and timm (``timm.optim.param_groups_weight_decay``). A listed name is a
    dotted name or its end: ``pos_embed`` also means ``encoder.pos_embed``. A group without parameters is left out.

    Args:
        no_weight_decay: Names in place of the model's list.
        decay_all: All of them in the first group.
        layer_lrs: Learning rate of each layer, as :func:`layer_lrs` gives them. Then every layer has its own two
            groups, the highest layer first.

    Raises:
        ConfigError: A name in ``no_weight_decay`` that fits no parameter.
        ValueError: A name in the model's list that fits none; it is wrong there.
    """
    listed = cast(Callable[[], set[str]], model.no_weight_decay)() if no_weight_decay is None else no_weight_decay
    parameters = dict(model.named_parameters())
    lost = sorted(name for name in listed if not any(_ends_with(full, name) for full in parameters))
    if no_weight_decay is not None:
        rule, remedy = f"names of parameters of {type(model).__name__}", f"Drop {', '.join(lost)}."
        require(not lost, "optimizer.no_weight_decay", rule, list(no_weight_decay), remedy)
    if lost:
        raise ValueError(
            f"{type(model).__name__}.no_weight_decay() must name parameters of the model, got {lost}, which fit none. "
            f"Mend the method."
        )
    layer_of = (lambda name: 0) if layer_lrs is None else cast(Callable[[str], int], model.layer_of)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for full, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim <= 1 or _ends_with(full, "bias") or any(_ends_with(full, name) for name in listed)
        members.setdefault((layer_of(full), free and not decay_all), []).append(parameter)
    groups = []
    for layer, exempt in sorted(members, key=lambda key: (-key[0], key[1])):
        group = {"params": members[layer, exempt], "weight_decay": 0.0 if exempt else weight_decay}
        groups.append(group if layer_lrs is None else {**group, "lr": layer_lrs[layer]})
    return groups


def layer_lrs(model: nn.Module, lr: float, layer_decay: float) -> list[float]:
    """``lr * layer_decay ** (depth + 1 - layer)`` of a transformer's layers 0 .. depth + 1: embedding, blocks, head.

    As in BEiT (arXiv:2106.08254) and MAE (2111.06377, appendix A.2): norm and head learn at ``lr``. Layers of a network
    of timm are those of its ``group_matcher``, which counts a final norm to the last block.

    Raises:
        ConfigError: A model without layers in a row.
    """
    remedy = "Set optimizer.layer_decay=1, or train a ViT, DeiT or ConViT."
    rule = f"1 for {type(model).__name__}, whose parameters are in no row of blocks"
    top = cast(int, getattr(model, "num_layer_groups", 0)) - 1
    require(top > 1, "optimizer.layer_decay", rule, layer_decay, remedy)
    return [lr * layer_decay ** (top - layer) for layer in range(top + 1)]


def _ends_with(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def build_optimizer(model: nn.Module, optimizer: schema.Optimizer, *, global_train_batch_size: int) -> Optimizer:
    """The optimizer a yaml names, over :func:`param_groups`, at the peak learning rate of this batch size.

    ``adamw`` and ``sgd`` are torch's (AdamW fused unless ``options`` says otherwise, on a CPU too, where it takes 0.3
    of the time of foreach; SGD with momentum 0.9, no Nesterov), ``adamw_schedulefree`` is the package ``schedulefree``,
    every other name is timm's. timm's ``lamb`` clips the gradient's global norm at 1 as DeiT III's apex FusedLAMB does;
    ``options: {max_grad_norm: null}`` switches that off. The Muon family moves what has no weight decay (positions,
    tokens, norms) by its AdamW, because orthogonal updates are meant for weight matrices.

    Raises:
        ConfigError: An unknown name or option, or a value the optimizer refuses.
    """
    name = optimizer.name
    cls = _optimizer_class(name)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in optimizer.options.items()}
    _check_options(cls, name, options)
    if name == "adamw" and not {"fused", "foreach"} & options.keys():
        options["fused"] = True
    if name == "sgd":
        options.setdefault("momentum", 0.9)
    lr = optimizer.peak_lr(global_train_batch_size)
    lrs = None if optimizer.layer_decay == 1 else layer_lrs(model, lr, optimizer.layer_decay)
    groups = param_groups(
        model,
        optimizer.weight_decay,
        no_weight_decay=optimizer.no_weight_decay,
        decay_all=optimizer.decay_all,
        layer_lrs=lrs,
    )
    if name.endswith("muon"):
        for group in groups:
            group["use_fallback"] = any(parameter.ndim <= 1 for parameter in group["params"])
    make: Any = cls if name in OUR_OPTIMIZERS else partial(timm_optim.create_optimizer_v2, opt=name)
    try:
        return make(groups, lr=lr, weight_decay=optimizer.weight_decay, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer.options must be values that {name} accepts, got {optimizer.options}. It says: {error}"
        ) from error


def _optimizer_class(name: str) -> type[Optimizer]:
    if name in OUR_OPTIMIZERS:
        return OUR_OPTIMIZERS[name]
    known = sorted({*OUR_OPTIMIZERS, *timm_optim.list_optimizers()})
    if name not in known:
        raise ConfigError(
            f"optimizer.name must be adamw, adamw_schedulefree, sgd or a name of timm.optim.list_optimizers(), got "
            f"{name!r}.{did_you_mean(name, known) or ' Use adamw or lamb.'}"
        )
    require(
        not timm_optim.get_optimizer_info(name).second_order,
        "optimizer.name",
        "a first-order optimizer",
        name,
        "Composer's training step keeps no graph for second derivatives. Use adamw or lamb.",
    )
    try:
        return timm_optim.get_optimizer_class(name, bind_defaults=False)
    except (ImportError, AssertionError) as error:
        raise ConfigError(
            f"optimizer.name must be an optimizer that is installed here, got {name!r}: {error}. Use adamw or lamb."
        ) from error


def _check_options(cls: type[Optimizer], name: str, options: dict[str, Any]) -> None:
    # Schedule-free AdamW would warm up once more.
    ours = ("params", "lr", "weight_decay", "warmup_steps")
    allowed = [key for key in inspect.signature(cls).parameters if key not in ours]
    for key in options:
        if key not in allowed:
            raise ConfigError(
                f"optimizer.options.{key} is not an option of {name}.{did_you_mean(key, allowed)} "
                f"Its options: {allowed}; lr and weight_decay stand beside them in optimizer, the warm-up in schedule."
            )


CosineFrom = Literal["start", "warmup"]


def cosine_with_warmup(
    t: float, total: float, warmup: float, *, alpha_i: float, alpha_f: float, cosine_from: CosineFrom
) -> float:
    """The factor of the peak learning rate at step ``t`` of ``total``.

    Linear from ``alpha_i`` at 0 to 1 at ``warmup``, then half a cosine to ``alpha_f`` at ``total``. With ``start`` the
    cosine's phase is ``t / total``, so it is already below 1 when the warm-up ends (DeiT; timm's CosineLRScheduler);
    with ``warmup`` it begins at 1 there (big_vision; timm with ``warmup_prefix``).
    """
    if t < warmup:
        return alpha_i + (1 - alpha_i) * t / warmup
    begin = 0.0 if cosine_from == "start" else warmup
    phase = (t - begin) / (total - begin) if t < total else 1.0
    return alpha_f + (1 - alpha_f) * 0.5 * (1 + math.cos(math.pi * phase))


class CosineWithWarmup:
    """:func:`cosine_with_warmup` as a Composer scheduler, stepped every batch: batch ``b`` trains at factor ``f(b)``.

    Composer's own schedulers lag one batch behind: they are stepped before the time advances, so the first two batches
    share a learning rate. This one does not lag, and equals timm's ``step_update`` at every batch.

    A loaded checkpoint brings the rate of the next step as it was when it was saved; ``set_rates`` puts that of the
    present configuration in its place, so that a run whose ``max_duration`` was changed has the rates of the new one.

    Args:
        t_warmup: Time string in ep, ba or sp, or a share of the run such as ``0.05dur``.
        global_train_batch_size: Images per step over all ranks; turns samples into batches.
        compute_share: Share of the run's training FLOPs that is spent when a step begins, by which warm-up and cosine
            move; None has them move by steps.
    """

    def __init__(
        self,
        t_warmup: str,
        *,
        alpha_i: float,
        alpha_f: float,
        cosine_from: CosineFrom,
        global_train_batch_size: int,
        compute_share: Callable[[float], float] | None = None,
    ) -> None:
        self.t_warmup = parse_time("schedule.t_warmup", t_warmup)
        self.alpha_i = alpha_i
        self.alpha_f = alpha_f
        self.cosine_from: CosineFrom = cosine_from
        self.global_train_batch_size = global_train_batch_size
        self.compute_share = compute_share

    def __call__(self, state: "State", ssr: float = 1.0) -> float:
        # The Trainer asks once while it compiles (it has no schedulers yet) for the first batch; then after each batch,
        # before it counts that batch, for the next one.
        return self._factor(state, int(state.timestamp.batch) + (1 if state.schedulers else 0))

    def set_rates(self, state: "State") -> None:
        """Give the optimizer the learning rates of the step that comes next."""
        factor = self._factor(state, int(state.timestamp.batch))
        for scheduler in state.schedulers:
            for base, group in zip(scheduler.base_lrs, scheduler.optimizer.param_groups, strict=True):
                group["lr"] = base * factor

    def _factor(self, state: "State", step: int) -> float:
        assert state.max_duration is not None, "the Trainer sets max_duration before it compiles schedulers"
        total = self._batches(state.max_duration.value, state.max_duration.unit.value, state)
        value, unit = self.t_warmup
        warmup = value * total if unit == "dur" else self._batches(value, unit, state)
        require(
            warmup <= total,
            "schedule.t_warmup",
            f"at most max_duration ({total:g} batches)",
            f"{value:g}{unit} = {warmup:g} batches",
            "The peak would never be reached: shorten the warm-up.",
        )
        t = float(step)
        if self.compute_share is not None:
            t, total = self.compute_share(t), 1.0
            warmup = value if unit == "dur" else self.compute_share(warmup)
        return cosine_with_warmup(
            t, total, warmup, alpha_i=self.alpha_i, alpha_f=self.alpha_f, cosine_from=self.cosine_from
        )

    def _batches(self, value: float, unit: str, state: "State") -> float:
        if unit == "ep":
            assert state.dataloader_len is not None, "our loaders know their length"
            return value * int(state.dataloader_len)
        return math.ceil(value / self.global_train_batch_size) if unit == "sp" else value
