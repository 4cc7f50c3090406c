"""A process that has imported everything and forks runs of train.py or vitcomposer: a start takes a second, not ten.

Reads a line of JSON for each call and answers with one: ``{"start": [...], "ranks": 2, "port": 29500, "log": FILE,
"notes": null}`` with the number of a process group, ``{"poll": GROUP}`` with its status or null. With a folder for
notes the run is that of watched_run.py. Arguments that begin with ``vitcomposer`` are a command of it.
"""

import json
import os
import signal
import sys
import traceback

import train
from recipes import RECIPES  # noqa: F401
from tests.faults import watched_run
from vitcomposer import cli


def start(arguments: list[str], ranks: int, port: int, log: str, notes: str | None) -> int:
    """In a session of its own: a launcher that waits for its ranks."""
    group = os.fork()
    if group:
        return group
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the ranks
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    for rank in range(ranks):
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _train(arguments, notes)
    os._exit(max(os.waitstatus_to_exitcode(os.wait()[1]) & 0xFF for _ in range(ranks)))


def _train(arguments: list[str], notes: str | None) -> None:
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if arguments[0] == "vitcomposer":
            status = cli.main(arguments[1:])
        else:
            status = (
                train.main(arguments, report_errors=True) if notes is None else watched_run.main([notes, *arguments])
            )
    except BaseException:
        traceback.print_exc()
    finally:
        # What the interpreter does at its end, but for the objects of the process that was forked.
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    statuses: dict[int, int] = {}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        if "start" in call:
            answer = start(call["start"], call["ranks"], call["port"], call["log"], call["notes"])
        else:
            group = call["poll"]
            if group not in statuses:
                ended, status = os.waitpid(group, os.WNOHANG)
                if ended:
                    statuses[group] = os.waitstatus_to_exitcode(status)
            answer = statuses.get(group)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
