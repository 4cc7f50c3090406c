"""Stops the run at the first non-finite loss or gradient, before a weight moves, and names the layer."""

import functools
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from composer.algorithms.sam import SAMOptimizer
from composer.callbacks import CheckpointSaver
from composer.core import Callback, DataSpec, Event, Precision, State, get_precision_context
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vitcomposer.data.random import random_key
from vitcomposer.errors import NonFiniteError

log = logging.getLogger(__name__)

OVERFLOWS = 30  # in a row, by when a loss scale of 65536 has come down to 2**-14: it was no overflow of float16
SPIKE_FACTOR = 2.0  # a loss so many times the median of the last SPIKE_WINDOW
SPIKE_WINDOW, SPIKE_LEAST = 100, 20  # steps
_IDS = 8  # of the samples in a message

REMEDY = (
    "Lower optimizer.lr, lengthen schedule.t_warmup, or add algorithms.GradientClipping={clipping_type: norm, "
    "clipping_threshold: 1.0}; run.skip_nonfinite_steps=N leaves out up to N such steps."
)


class _SkipStep(Exception):
    """Leaves an optimizer before it moves anything."""


class NumericsMonitor(Callback):
    """Ends the run at the first step whose loss or gradient is not finite, before any weight is moved by it.

    The norm of all gradients is reduced over the ranks and copied to the host without waiting. Composer reads the loss
    right behind it, in the closure that an optimizer calls before it moves anything; that is where the copy is looked
    at, so the step is known exactly and nothing waits for this. A loss that is not finite though its gradients are is
    found at the end of its step. In float16 the gradient scaler leaves out steps by itself: there it takes a loss that
    is not finite, or ``OVERFLOWS`` steps in a row. Before a checkpoint the weights are looked at too: a step too long
    spoils them with finite gradients. Put this callback after those that it should not be stopped by.

    Once something is found, all ranks run the batch again, without compiled code and with a look at each module.

    A loss ``SPIKE_FACTOR`` times the median of the last ``SPIKE_WINDOW`` steps is logged as ``loss_spikes/factor`` and
    ``loss_spikes/count``, once for steps in a row; a step left out as ``skipped_steps/count``.

    Args:
        train: Of the loader that trains, to run a batch again.
        seed: Of ``StepSeed``, so that the same blocks are dropped then.
        latest: Link to the run's last checkpoint.
        skip_steps: So many such steps of the whole run are left out instead: weights, optimizer and buffers stay as
            they were, while the schedule goes on. Buffers are copied at each step for this; float16 leaves to the
            scaler what it does, and its steps count only where the loss is not finite.
    """

    def __init__(self, train: DataSpec, *, seed: int, latest: Path, skip_steps: int = 0) -> None:
        self.train, self.seed, self.latest, self.skip_steps = train, seed, latest, skip_steps
        self.skipped = self.spikes = 0
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._in_spike = self._left_out = False
        self._overflows = 0
        self._lr = 0.0
        self._buffers: list[tuple[Tensor, Tensor]] = []  # each and what it was before the step
        self._watched: list[tuple[Optimizer, Callable[..., Any]]] = []
        self._arrived: Any = None  # a CUDA event

    def fit_start(self, state: State, logger: Logger) -> None:
        self._parameters = list(state.model.parameters())
        on_gpu = state.device.name == "gpu"
        self._host = torch.zeros(1, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None
        for optimizer in state.optimizers:
            self._watched.append((optimizer, optimizer.step))
            optimizer.step = self._watch(optimizer, state)

    def _watch(self, optimizer: Optimizer, state: State) -> Callable[..., Any]:
        """``optimizer.step`` that leaves before it moves anything where the gradients are not finite."""
        original = optimizer.step

        @functools.wraps(original)  # with the mark by which torch's schedulers know a step that they wrapped
        def step(*args: Any, closure: Callable[..., Any] | None = None, **options: Any) -> Any:
            if closure is None:  # the gradient scaler has decided
                return original(*args, **options)
            passes = 0

            def checked(**kwargs: Any) -> Any:
                nonlocal passes
                loss = closure(**kwargs)
                passes += 1
                if self._gradients_are_bad():
                    self._count_or_raise(state, state.timestamp.batch.value + 1, loss)
                    raise _SkipStep
                return loss

            try:
                return original(*args, closure=checked, **options)
            except _SkipStep:
                self._undo(optimizer, passes)

        return step

    def batch_start(self, state: State, logger: Logger) -> None:
        self._left_out = False
        self._lr = max(float(group["lr"]) for optimizer in state.optimizers for group in optimizer.param_groups)
        if self.skip_steps:
            self._buffers = [(buffer, buffer.detach().clone()) for buffer in state.model.buffers()]

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        norms = _sum_norms((parameter.grad for parameter in self._parameters), state)
        self._host.copy_(norms, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def _gradients_are_bad(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()  # it is here: Composer has read the loss, which was behind it
        return not math.isfinite(self._host.numpy()[0])

    def _count_or_raise(self, state: State, step: int, loss: float) -> None:
        if self.skipped >= self.skip_steps:
            raise NonFiniteError(self._explain(state, step, loss))
        self.skipped += 1
        self._left_out = True

    @torch.no_grad()
    def _undo(self, optimizer: Optimizer, passes: int) -> None:
        for buffer, before in self._buffers:
            buffer.copy_(before)
        if isinstance(optimizer, SAMOptimizer):
            if passes == 2:  # it has climbed
                optimizer.sub_e_w()
            optimizer.global_step += 1

    def batch_end(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        losses = cast(dict[str, float] | None, state.total_loss_dict)
        loss = losses["loss/train/total"] if losses else math.nan
        if not self._left_out and not math.isfinite(loss):
            self._count_or_raise(state, step, loss)
        if self._left_out:
            logger.log_metrics({"skipped_steps/count": self.skipped})
            if dist.get_global_rank() == 0:
                log.warning("Step %d is left out, not finite: %d of %d.", step, self.skipped, self.skip_steps)
            return
        if state.precision == Precision.AMP_FP16:
            self._overflows = self._overflows + 1 if self._gradients_are_bad() else 0
            if self._overflows == OVERFLOWS:
                raise NonFiniteError(self._explain(state, step, loss))
        self._look_for_spike(step, loss, logger)

    def _look_for_spike(self, step: int, loss: float, logger: Logger) -> None:
        factor = 0.0
        if len(self._recent) >= SPIKE_LEAST and (median := statistics.median(self._recent)) > 0:
            factor = loss / median
        self._recent.append(loss)
        begins, self._in_spike = factor >= SPIKE_FACTOR and not self._in_spike, factor >= SPIKE_FACTOR
        if begins:
            self.spikes += 1
            logger.log_metrics({"loss_spikes/factor": factor, "loss_spikes/count": self.spikes})
            if dist.get_global_rank() == 0:
                log.warning("The loss rises at step %d to %.4g, %.1f times its median.", step, loss, factor)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._check_weights(state, Event.BATCH_CHECKPOINT)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._check_weights(state, Event.EPOCH_CHECKPOINT)

    @torch.no_grad()
    def _check_weights(self, state: State, event: Event) -> None:
        savers = [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
        if not any(cast(Callable[..., bool], saver.save_interval)(state, event) for saver in savers):
            return
        if math.isfinite(_sum_norms(self._parameters, state).item()):
            return
        norms = ((name, _of_this_rank(weight).norm()) for name, weight in state.model.named_parameters())
        names = [name for name, norm in norms if not _is_finite(norm)]
        named = [name for names in dist.all_gather_object(names) for name in names]
        raise NonFiniteError(
            f"Not finite after step {state.timestamp.batch.value}: the weights {named[0].removeprefix('module.')}, lr "
            f"{self._lr:.3g}, though every gradient was. They are not saved; {self._last()} {REMEDY}"
        )

    def fit_end(self, state: State, logger: Logger) -> None:
        self._release()

    def close(self, state: State, logger: Logger) -> None:
        self._release()

    def _release(self) -> None:
        while self._watched:
            optimizer, step = self._watched.pop()
            optimizer.step = step
        self._buffers = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "spikes": self.spikes, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.spikes = state["skipped"], state["spikes"]
        self._recent.extend(state["recent"])

    def _explain(self, state: State, step: int, loss: float) -> str:
        torch.manual_seed(random_key(self.seed, step - 1, dist.get_global_rank()))
        fault = _find_fault(state, self.train)
        ids = state.batch.get("sample_id") if isinstance(state.batch, dict) else None
        own = (fault, [] if ids is None else ids.tolist(), loss)
        ranks: list[tuple[str | None, list[int], float]] = dist.all_gather_object(own)
        found = [rank for rank, (where, *_) in enumerate(ranks) if where]
        rank = found[0] if found else 0
        where, ids, loss = ranks[rank]
        where = where or "nowhere when the batch was run again"
        more = f" and {len(ids) - _IDS} more" if len(ids) > _IDS else ""
        scale = state.scaler.get_scale() if state.precision == Precision.AMP_FP16 and state.scaler else 1
        spent = f", {self.skipped} steps are left out already" if self.skipped else ""
        return (
            f"Not finite at step {step}: loss {loss:.4g}, lr {self._lr:.3g}, loss scale {scale:g}{spent}. First of all "
            f"on rank {rank}: {where}, sample ids {', '.join(map(str, ids[:_IDS]))}{more}. It moved no weight; "
            f"{self._last()} {REMEDY}"
        )

    def _last(self) -> str:
        if not self.latest.exists():
            return "there is no checkpoint yet."
        return f"the last checkpoint is {self.latest.resolve()}."


def _find_fault(state: State, train: DataSpec) -> str | None:
    """Which tensor of this rank is the first that is not finite when the batch is run again; None for none of them.

    All ranks have to call it, since networks and losses may talk to the other ranks; buffers change.
    """
    model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    network = cast(ComposerModel, model)
    spoilt = next((name for name, weight in network.named_parameters() if not _is_finite(weight)), None)
    if spoilt is not None:
        fault = f"the weights {spoilt} before the step"
    else:
        fault = _run_again(state, network, train, backward=False)
    if any(dist.all_gather_object(fault)):
        return fault
    fault = _run_again(state, network, train, backward=True)
    if fault is None:
        # The last of them comes first on the way back.
        named = [name for name, weight in network.named_parameters() if not _is_finite(weight.grad)]
        fault = f"the gradient of {named[-1]}" if named else None
    return fault


def _run_again(state: State, network: ComposerModel, train: DataSpec, *, backward: bool) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if not found and not _is_finite(outputs):
                found.append(f"the output of {name or 'the model'} ({type(module).__name__})")

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules()]
    network.zero_grad(set_to_none=True)
    try:
        with torch.set_grad_enabled(backward), torch.compiler.set_stance("force_eager"):
            assert state.device_train_microbatch_size is not None
            for part in train.split_batch(state.batch, state.device_train_microbatch_size):
                batch = train.microbatch_transforms(state.device.batch_to_device(part))
                if not found and not _is_finite(batch):
                    found.append("the images of the batch")
                with get_precision_context(state.precision):
                    loss = network.loss(network(batch), batch)
                if not found and not _is_finite(loss):
                    found.append("the loss")
                if backward:
                    sum(part.mean() for part in _tensors(loss)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _sum_norms(tensors: Iterable[Tensor | None], state: State) -> Tensor:
    """(1,): the sum of all norms on all ranks, not finite where one of them is not; nothing is read back."""
    local = [_of_this_rank(tensor) for tensor in tensors if tensor is not None]
    if local:
        total = torch.stack(torch._foreach_norm(local)).sum().float().view(1)  # pyright: ignore[reportPrivateImportUsage]
    else:
        total = state.device.tensor_to_device(torch.zeros(1))
    if dist.get_world_size() > 1:
        dist.all_reduce(total, reduce_operation="SUM")
    return total


def _is_finite(value: Any) -> bool:
    return all(bool(_of_this_rank(tensor).isfinite().all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dictionaries; those of integers are finite and left out."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _of_this_rank(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
