"""Run an entry with its seeds, and check one that somebody sends."""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.provenance import commit, cpu_name
from benchmarks.speedrun.tracks import MAX_P, MIN_SEEDS, TRACKS, Clock, Track
from vitcomposer import config
from vitcomposer.data.mds.index import count_samples

RECIPE, RESULT = "recipe.yaml", "result.json"
# What an entry may not bring along: every weight has to be trained on the clock, from the track's training images.
_FORBIDDEN = ("init.weights", "teacher", "cache", "data.remote", "run.remote")


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        mean, deviation: Of top-1 over the seeds, as fractions.
        p: One-sided p of a t-test that the mean is above the target.
        seconds, clock: Mean over the seeds, and its unit.
        faults: Why the entry does not count; none where it does.
    """

    mean: float
    deviation: float
    p: float
    seconds: float
    clock: Clock
    faults: list[str]


def run(track: Track, yaml: Path, folder: Path, seeds: list[int], work: Path, weights: str) -> None:
    """Train every seed from its launch to its end, measure the last weights again from disk, and write the entry.

    Args:
        folder: Of the entry, which is written.
        weights: ``raw`` or ``ema``, chosen before; the best of both, or of several epochs, is not allowed.
    """
    data = prepare(track, work)
    faults = faults_of_recipe(track, yaml, data)
    if faults:
        sys.exit("\n".join(f"error: {fault}" for fault in faults))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(yaml, folder / RECIPE)
    work = work / f"{track.name}-{folder.name}"
    _write(
        track, folder, [_train(track, folder / RECIPE, data, seed, work, weights) for seed in seeds], weights, commit()
    )


def adopt(track: Track, folder: Path, results: list[Path], work: Path, weights: str) -> None:
    """An entry of runs that ``benchmarks.accuracy.photos`` trained from a yaml as it is and timed, process by process.

    Args:
        results: Its files, one a seed, each beside the run folder of its name.
    """
    data, yaml = prepare(track, work), ROOT / json.loads(results[0].read_text())["yaml"]
    faults = faults_of_recipe(track, yaml, data)
    if faults:
        sys.exit("\n".join(f"error: {fault}" for fault in faults))
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    shutil.copy(yaml, folder / RECIPE)
    runs = []
    for path in results:
        found, trained = json.loads(path.read_text()), path.with_suffix("")
        changed = set(found["keys"]) - {"seed", "data.train_split"}
        if changed or found["keys"].get("data.train_split") != "train":
            sys.exit(f"error: {path} has other keys than {yaml.name}: {sorted(changed)}")
        summary = json.loads((trained / "summary.json").read_text())
        cost = {"cpu_seconds": round(found["cpu"], 1), "wall_seconds": round(summary["seconds"], 1)}
        runs.append(_measured(track, trained, folder, data, found["seed"], weights) | cost)
    trained_at = {json.loads(path.read_text())["commit"] for path in results}
    _write(track, folder, runs, weights, ", ".join(sorted(trained_at)))


def _write(track: Track, folder: Path, runs: list[dict[str, Any]], weights: str, trained_at: str) -> None:
    versions = {package: version(package) for package in ("torch", "timm", "mosaicml")}
    machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[2]}
    found = {"track": track.name, "weights": weights, "runs": runs, "machine": machine}
    found |= {"commit": trained_at, "versions": versions, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    (folder / RESULT).write_text(json.dumps(found, indent=1) + "\n")


def prepare(track: Track, work: Path) -> Path:
    """The track's data set; the digits are made here, the others by who enters."""
    data = work / track.name
    if not (data / "val" / "index.json").exists():
        if track.name != "digits":
            sys.exit(f"error: no data set in {data}. Make it there: {track.command.replace('datasets/', f'{work}/')}")
        _vitcomposer("convert", "digits", str(data))
    return data


def faults_of_recipe(track: Track, yaml: Path, data: Path) -> list[str]:
    """What in a recipe breaks the rules."""
    cfg = config.load(yaml, [f"data.local={data}"])
    faults = [f"{key} is set: all weights are trained on the clock" for key in _FORBIDDEN if _is_set(yaml, key)]
    if cfg.data.train_split != "train":
        faults.append(f"data.train_split is {cfg.data.train_split}, training images are those of train")
    counts = tuple(count_samples(cfg.data, split) for split in ("train", "val"))
    if counts != track.images:
        faults.append(f"{data} has {counts} training and validation images, the track {track.images}")
    return faults


def _is_set(yaml: Path, key: str) -> bool:
    from omegaconf import OmegaConf

    return OmegaConf.select(OmegaConf.load(yaml), key) is not None


def _train(track: Track, yaml: Path, data: Path, seed: int, work: Path, weights: str) -> dict[str, Any]:
    folder = work / f"seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    keys = {"data.local": data, "seed": seed, "run.folder": work, "run.name": folder.name}
    keys |= {"run.eval_interval": "1dur", "run.patience": "null", "run.progress_bar": "false"}
    began, used = time.monotonic(), _children()
    _vitcomposer("train", str(yaml), *(f"{key}={value}" for key, value in keys.items()))
    wall, cpu = time.monotonic() - began, _children() - used
    found = _measured(track, folder, yaml.parent, data, seed, weights)
    found |= {"cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}
    print(f"seed {seed}: top-1 {100 * found['top1']:.2f} %, {cpu:.1f} CPU s, {wall:.1f} s", flush=True)
    return found


def _measured(track: Track, folder: Path, entry: Path, data: Path, seed: int, weights: str) -> dict[str, Any]:
    """What a run reached, measured again from its checkpoint; its log goes into the entry."""
    summary = json.loads((folder / "summary.json").read_text())
    _vitcomposer("eval", str(folder), "--data", str(data), "--weights", weights, "--out", str(folder / "checked"))
    (measured,) = json.loads((folder / "checked" / "eval.json").read_text())["results"]
    logs = entry / "logs"
    logs.mkdir(exist_ok=True)
    shutil.copy(folder / "metrics.jsonl", logs / f"seed{seed}.jsonl")
    found = {"seed": seed, "top1": measured["top1"], "images": measured["images"], "bad_images": measured["bad_images"]}
    hours = summary["world_size"] * summary["seconds"] / 3600 if track.clock == "GPU-hours" else None
    return found | {"steps": summary["steps"], "gpu_hours": hours}


def _vitcomposer(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "vitcomposer", *words], cwd=ROOT, check=False, stdout=sys.stderr)
    if done.returncode:
        sys.exit(f"error: vitcomposer {words[0]} ended with {done.returncode}")


def _children() -> float:
    """CPU seconds of the processes that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check(folder: Path) -> Verdict:
    """Judge an entry by what it has on disk: its recipe, its runs, and its logs."""
    found = json.loads((folder / RESULT).read_text())
    track = TRACKS[found["track"]]
    runs = found["runs"]
    top1, seeds = [run["top1"] for run in runs], [run["seed"] for run in runs]
    clock = "cpu_seconds" if track.clock == "CPU seconds" else "gpu_hours"
    faults = [f"{key} is set in its recipe" for key in _FORBIDDEN if _is_set(folder / RECIPE, key)]
    if len(set(seeds)) < max(MIN_SEEDS, len(seeds)):
        faults.append(f"seeds {seeds}: {MIN_SEEDS} or more that differ are asked for")
    for run in runs:
        if run["images"] != track.images[1] or run["bad_images"]:
            faults.append(f"seed {run['seed']} was measured on {run['images']} images, {run['bad_images']} of them bad")
        faults += _faults_of_log(folder / "logs" / f"seed{run['seed']}.jsonl", run["steps"])
    p = chance(top1, track.target)
    if p >= MAX_P:
        faults.append(f"p is {p:.3g}: that its mean reaches {100 * track.target:.1f} % is not shown (p < {MAX_P})")
    deviation = statistics.stdev(top1) if len(top1) > 1 else float("nan")
    seconds = statistics.mean(run[clock] or 0.0 for run in runs)
    return Verdict(statistics.mean(top1), deviation, p, seconds, track.clock, faults)


def _faults_of_log(log: Path, steps: int) -> list[str]:
    if not log.exists():
        return [f"{log.parent.name}/{log.name} is missing"]
    last = max((json.loads(line).get("step", 0) for line in log.read_text().splitlines()), default=0)
    return [] if last >= steps else [f"{log.parent.name}/{log.name} ends at step {last} of {steps}"]


def chance(values: list[float], target: float) -> float:
    """One-sided p of Student's t-test that the mean of ``values`` is above ``target``; 1 for fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return 1.0
    if len(set(values)) == 1:  # no spread: the test is not defined
        return 0.0 if values[0] > target else 1.0
    return float(stats.ttest_1samp(values, target, alternative="greater").pvalue)
