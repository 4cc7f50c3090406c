"""Trains on small images first: prints the plan of image sizes and holds the run to it; the loader makes the images."""

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from vitcomposer.curriculum import Plan


class Curriculum(Algorithm):
    """Training on smaller images first, after EfficientTrain++ (arXiv:2405.08768).

    Its low-frequency crop is an antialiased resize here. The batch keeps its size in all stages: so do the learning
    rate, which is tuned to it, and the number of steps in an epoch. Evaluation is always at full size.

    Prints the plan on rank 0; logs ``curriculum/image_size`` and ``curriculum/rand_augment``, the factor on the
    magnitude.

    Raises:
        ValueError: At the start of a resumed run whose epochs had another number of steps.
        RuntimeError: At a step whose images are not of the planned size.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._check_epochs(state)
            if dist.get_global_rank() == 0:
                print(f"Curriculum\n{self.plan.table()}", flush=True)
            return
        step = state.timestamp.batch.value
        planned, given = self.plan.stage_of(step).image_size, state.batch["image"].shape[-1]
        if given != planned:
            raise RuntimeError(f"step {step} must have images of {planned} pixels as planned, got {given}")
        logger.log_metrics({"curriculum/image_size": planned, "curriculum/rand_augment": self.plan.rand_augment(step)})

    def _check_epochs(self, state: State) -> None:
        """Loader workers count the steps of earlier epochs by the length of an epoch, which ranks may change."""
        now, length = state.timestamp, self.plan.steps_per_epoch
        begun = now.batch.value - now.batch_in_epoch.value  # steps before this epoch
        if begun != now.epoch.value * length:
            raise ValueError(
                f"data must give the epochs of the checkpoint, {begun} steps before epoch {now.epoch.value}, got "
                f"{length} steps an epoch. Resume with the data set and the number of ranks that it was made with."
            )
