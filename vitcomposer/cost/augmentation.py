"""Says where RandAugment costs a run less: in the loader's workers, or in whole batches on its GPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vitcomposer.cost.estimate import build_without_storage
from vitcomposer.cost.gpu_speed import Network, Speed, View
from vitcomposer.cost.gpus import gpu_of_device
from vitcomposer.cost.input_speed import one_thread
from vitcomposer.cost.step_speed import seconds_of
from vitcomposer.data.augment.policies import fill_colour
from vitcomposer.data.augment.programs_torch import apply_programs
from vitcomposer.data.batch import OP_CODES, OP_VALUES, Sample
from vitcomposer.data.collate import TrainCollate
from vitcomposer.schema import Supervised
from vitcomposer.shipped import RESULTS

_WORTH = 0.97  # of the time of a step in the workers, that one on the device takes at most to be chosen
_TURNS = 3  # of either kind in a worker, of which the quickest counts
_SECONDS = 0.3  # of measuring on the device


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds, as measured on this machine with images of the data set.

    Attributes:
        image_in_worker: Decode, crop and RandAugment of one image.
        image_without: The same with RandAugment left to the device.
        batch_on_device: RandAugment of one batch of a rank, from its launch to its end.
    """

    image_in_worker: float
    image_without: float
    batch_on_device: float


def is_better_on_device(costs: Costs, *, batch: int, workers: int, image_in_step: float) -> bool:
    """Whether a step ends sooner, the slower of loader and device deciding.

    Args:
        batch: Images of a rank.
        workers: Of its loader; 0 has the main process load.
        image_in_step: Seconds of one image on the GPU, forward and backward.
    """
    step = batch * image_in_step
    at_once = max(1, workers)
    in_worker = max(batch * costs.image_in_worker / at_once, step)
    on_device = max(batch * costs.image_without / at_once, step + costs.batch_on_device)
    return on_device < _WORTH * in_worker


def measure_costs(
    collate: TrainCollate, samples: list[Sample], mean: tuple[float, float, float], *, batch: int, device: torch.device
) -> Costs:
    """Both ways of augmenting images of a data set, on one core of this machine and on a device.

    Args:
        collate: Whose ``augment_on_device`` is as before afterwards.
        samples: An even number.
        mean: Of ``augment``, with which geometry fills.
        batch: Images that the device augments at once.
    """
    before, spent = collate.augment_on_device, {}
    with one_thread():
        for on_device in (False, True):
            collate.augment_on_device = on_device
            spent[on_device] = _quickest(lambda: collate(samples)) / len(samples)
        collate.augment_on_device = True
        made = collate(samples)
    collate.augment_on_device = before
    places = torch.arange(batch) % len(samples)
    images = made["image"][places].to(device)  # uint8 (batch, 3, S, S)
    codes, values = (made[key][places.numpy()] for key in (OP_CODES, OP_VALUES))  # (batch, L) each
    whole = seconds_of(lambda: apply_programs(images, codes, values, fill_colour(mean)), device, _SECONDS)
    return Costs(image_in_worker=spent[False], image_without=spent[True], batch_on_device=whole)


def _quickest(call: Callable[[], object]) -> float:
    call()  # kernels are compiled or loaded
    turns = []
    for _ in range(_TURNS):
        began = time.perf_counter()
        call()
        turns.append(time.perf_counter() - began)
    return min(turns)


def seconds_in_step(cfg: Supervised, device_name: str) -> float | None:
    """Of one image of the full size on a GPU, measured or estimated as ``plan`` has it; None where neither is known.

    Args:
        cfg: With the precision that the run has.
        device_name: As ``torch.cuda.get_device_name()`` returns it.
    """
    row = gpu_of_device(device_name)
    if row is None or cfg.precision == "auto":
        return None
    network = Network(build_without_storage(cfg.model))
    return Speed(network, row, cfg.precision, RESULTS).seconds(View(1, cfg.model.image_size, 1.0))
