"""The command line of :mod:`benchmarks.speedrun`."""

import argparse
from pathlib import Path

import benchmarks.speedrun
from benchmarks import ROOT
from benchmarks.speedrun import entry
from benchmarks.speedrun.table import write_table
from benchmarks.speedrun.tracks import TRACKS


def main() -> int:
    args = _parse()
    if args.command == "table":
        write_table()
        return 0
    if args.command == "run":
        track = TRACKS[args.track]
        args.entry = args.out / args.name if args.out else track.entries / args.name
        entry.run(track, args.yaml, args.entry, args.seeds, args.work, args.weights)
    if args.command == "adopt":
        track = TRACKS[args.track]
        args.entry = args.out / args.name if args.out else track.entries / args.name
        entry.adopt(track, args.entry, args.results, args.work, args.weights)
    if not (args.entry / entry.RESULT).exists():
        raise SystemExit(f"error: {args.entry} is no entry: it has no {entry.RESULT}")
    verdict = entry.check(args.entry)
    print(f"top-1 {100 * verdict.mean:.2f} +- {100 * verdict.deviation:.2f} %, p {verdict.p:.2g}")
    print(f"{verdict.seconds:.3g} {verdict.clock}")
    for fault in verdict.faults:
        print(f"does not count: {fault}")
    return 1 if verdict.faults else 0


def _parse() -> argparse.Namespace:
    doc = benchmarks.speedrun.__doc__
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train an entry with every seed, and write it")
    adopt = commands.add_parser("adopt", help="write an entry of runs of benchmarks.accuracy.photos")
    for each in (run, adopt):
        each.add_argument("track", choices=TRACKS)
        each.add_argument("--name", required=True, help="of the entry's folder")
        each.add_argument("--weights", choices=("raw", "ema"), default="raw", help="of the last step, measured here")
        each.add_argument("--out", type=Path, help="folder of entries (default: that of the track)")
        each.add_argument("--work", type=Path, default=ROOT / ".bench/speedrun", help="data sets and runs")
    run.add_argument("yaml", type=Path)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    adopt.add_argument("results", type=Path, nargs="+", help="files of its results, beside the run folders")
    check = commands.add_parser("check", help="judge an entry; exit code 1 where it does not count")
    check.add_argument("entry", type=Path, help="folder below entries/TRACK")
    commands.add_parser("table", help="write the tables of README.md anew")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
