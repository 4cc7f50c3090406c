"""Train a recipe: composer -n 8 train.py yamls/deit_s.yaml [key=value ...], installed -m vitcomposer.train deit_s"""

import os
import signal
import sys

from vitcomposer import config, escape, needed_files
from vitcomposer.errors import ConfigError
from vitcomposer.runs.opening import say_opening


def main(argv: list[str], *, report_errors: bool = False) -> int:
    """Load the yaml, build the recipe's Trainer and fit; ``report_errors`` prints one line where it would raise.

    Returns:
        0 when the run is finished (also if it already was), 2 for what no other start will mend, 74 for a finished run
        of which run.remote has not got all, 143 after a checkpoint for a signal, 130 for Ctrl-C (with one too, unless
        it is pressed twice), 1 for all else: in all but the second case the same command goes on.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    # torchrun sets GROUP_RANK where Composer's own launcher sets NODE_RANK.
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    try:
        cfg = config.load(argv[0], argv[1:], also=needed_files.check_needed_files)
    except ConfigError as error:
        escape.print_error(str(error))
        return 2
    say_opening(cfg)
    # Composer has SIGTERM exit with 143: a rank that its launcher ends because another one failed would have the run
    # started again for ever (see Preemption).
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    from recipes import RECIPES
    from vitcomposer.runs.failures import end_together, status_of_rank
    from vitcomposer.runs.folder import unlock_run_folder
    from vitcomposer.training.whole_run import run_to_end

    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)  # a Ctrl-C that came meanwhile arrives here
        return status_of_rank(run_to_end(cfg, RECIPES[cfg.recipe].build))
    except (Exception, KeyboardInterrupt) as error:
        if not (report_errors or isinstance(error, ConfigError)):
            raise
        return status_of_rank(end_together(error, cfg))
    finally:
        unlock_run_folder(cfg)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], report_errors=True))
