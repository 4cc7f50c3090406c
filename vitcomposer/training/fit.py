"""Runs a Trainer to its end, and frees what it held."""

from composer import Trainer
from composer.core import Event
from composer.utils import dist
from torch.distributed.checkpoint import state_dict

from vitcomposer.callbacks import Best, Preemption
from vitcomposer.foundations import forget_engine, lean_steps
from vitcomposer.runs.folder import (
    only_writer_of_run,
)
from vitcomposer.schema.probe import NO_STEP
from vitcomposer.schema.recipe import Recipe
from vitcomposer.training.execution import (
    attention_order,
)
from vitcomposer.training.trainer import (
    _say_where_it_goes_on,
)


def fit(trainer: Trainer, cfg: Recipe) -> int:
    """Train to the end, or measure where a recipe has no step.

    Returns:
        0, or what ``Preemption`` has where a signal stopped the run after a checkpoint.
    """
    stopped = next(c for c in trainer.state.callbacks if isinstance(c, Preemption))
    try:
        with only_writer_of_run(cfg), attention_order(cfg.run.attention_backends), lean_steps(trainer):
            if cfg.max_duration == NO_STEP or _has_all_steps(trainer) or _has_ended_early(trainer):
                _end_without_a_step(trainer)
            else:
                trainer.fit()
        end_workers(trainer)
        trainer.close()
    except BaseException:
        # Trainer.close() waits for all ranks, and the others may not come here.
        end_workers(trainer)
        trainer.engine.close()
        raise
    finally:
        let_go(trainer)
    if stopped.stopped and dist.get_global_rank() == 0:
        _say_where_it_goes_on(trainer.state)
    return stopped.status


def let_go(trainer: Trainer) -> None:
    """Drop what Composer and torch keep of a closed run to the end of the process: its weights and its optimizer."""
    forget_engine(trainer)
    forget = getattr(getattr(state_dict, "_get_fqns", None), "cache_clear", None)  # private, and a cache of modules
    if forget is not None:
        forget()


def _has_all_steps(trainer: Trainer) -> bool:
    """Whether a run was killed after its last checkpoint, in the evaluation or before the summary was written."""
    duration = trainer.state.max_duration
    assert duration is not None, "Trainer was given it"
    return trainer.state.timestamp.get(duration.unit) >= duration


def _has_ended_early(trainer: Trainer) -> bool:
    """Whether its last checkpoint is that of a run which got no better for long enough."""
    return any(each.stopped_by is not None for each in trainer.state.callbacks if isinstance(each, Best))


def _end_without_a_step(trainer: Trainer) -> None:
    """What comes before and after the steps, which Composer refuses to run without one."""
    trainer.engine.run_event(Event.FIT_START)
    trainer.engine.run_event(Event.FIT_END)
    if trainer.state.evaluators:
        trainer.engine.run_event(Event.EVAL_BEFORE_ALL)
        trainer.eval()
        trainer.engine.run_event(Event.EVAL_AFTER_ALL)


def end_workers(trainer: Trainer) -> None:
    """End persistent loader workers now: Python's own clean-up sends them the one SIGTERM that they outlive."""
    state = trainer.state
    for loader in (state.train_dataloader, *(evaluator.dataloader.dataloader for evaluator in state.evaluators)):
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
