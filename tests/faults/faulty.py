"""train.py with a fault in it, for a launcher: faulty.py WHEN STEP RANK WHAT FILE YAML [key=value ...]

WHEN is ``start``, ``build`` or an event of Composer; WHAT is ``kill``, ``hang``, ``interrupt`` (this rank), ``ctrl_c``
(all processes), ``refuse``, ``raise``, ``worker`` (kills a loader worker), ``memory``, ``output:MODULE``,
``gradient:PARAMETER`` (not finite in that step), ``large:MODULE`` (its output a thousand times as large), ``fill:PATH``
(with zeros, until the disk is full), ``delete:FOLDER`` or ``nothing``. The time of the fault is written to FILE.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

# As train.py does it before it imports Composer.
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLERS)
from composer import Callback  # noqa: E402
from composer.core import Event, State  # noqa: E402
from composer.loggers import Logger  # noqa: E402

import train  # noqa: E402
from recipes import RECIPES  # noqa: E402
from vitcomposer import config  # noqa: E402
from vitcomposer.errors import ConfigError  # noqa: E402

NOW = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "ctrl_c": lambda: os.killpg(0, signal.SIGINT),
    "worker": lambda: psutil.Process().children()[0].kill(),
}
ERRORS = {
    "raise": RuntimeError("the fault of the test"),
    "refuse": ConfigError("run.name must be another one on this rank, got it. Change it."),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}


class Fault(Callback):
    """Does ``what`` in step number ``step`` from 0."""

    def __init__(self, when: str, step: int, what: str, file: Path) -> None:
        self.when, self.step, self.what, self.file = when, step, what, file
        self.done = False

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        kind, _, name = self.what.partition(":")
        network = getattr(state.model, "module", state.model)
        if event == Event.FIT_START and kind in ("output", "large"):
            factor = float("nan") if kind == "output" else 1000.0
            module = dict(network.named_modules())[name]
            module.register_forward_hook(lambda m, i, out: self.spoil(out, factor) if self.is_due(state) else None)
        elif event == Event.FIT_START and kind == "gradient":
            weight = dict(network.named_parameters())[name]
            weight.register_hook(lambda grad: self.spoil(grad, float("nan")) if self.is_due(state) else None)
        elif event == Event.BATCH_START and kind in ("fill", "delete") and self.is_due(state):
            self.file.write_text(str(time.time()))
            fill(Path(name)) if kind == "fill" else shutil.rmtree(name)
        elif event.value == self.when and self.is_due(state) and not self.done:
            self.done = True
            self.act()

    def is_due(self, state: State) -> bool:
        return state.timestamp.batch.value == self.step

    def spoil(self, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        if not self.done:
            self.done = True
            self.file.write_text(str(time.time()))
        return tensor * factor

    def act(self) -> None:
        self.file.write_text(str(time.time()))
        if self.what in ERRORS:
            raise ERRORS[self.what]
        if self.what != "nothing":
            NOW[self.what]()


def fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def run(when: str, step: int, rank: int, what: str, file: Path, argv: list[str]) -> int:
    """train.py on ``argv``; the fault is that of one rank."""
    recipe: Any = RECIPES[config.load(argv[0], argv[1:]).recipe]
    fault, build = Fault(when, step, what, file), recipe.build
    if os.environ.get("RANK", "0") != str(rank):
        return train.main(argv, report_errors=True)
    if when == "start":
        fault.act()

    def build_with_fault(cfg: Any) -> Any:
        if when == "build":
            fault.act()
        trainer = build(cfg)
        trainer.state.callbacks.insert(0, fault)
        return trainer

    recipe.build = build_with_fault
    try:
        return train.main(argv, report_errors=True)
    finally:
        recipe.build = build


if __name__ == "__main__":
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLERS)
    when, step, rank, what, file, *argv = sys.argv[1:]
    sys.exit(run(when, int(step), int(rank), what, Path(file), argv))
