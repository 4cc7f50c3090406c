"""How a run grows: two ranks against one as measured here, and ImageNet over 8 and 64 ranks as computed.

    python -m benchmarks.scale --out benchmarks/results/scale.json

Measured (``--measure``): images per second of a rank with one rank and with two, DDP and FSDP2, on synthetic images and
on JPEGs streamed into an empty cache. Every rank has one thread and its own share of images, so a perfect machine keeps
the number (weak scaling). Candidates take turns in every round, and only ratios inside a round are compared. Also what
activation checkpointing frees and costs.

Computed (``--compute``): the order in which ``data.mds.order`` deals 1.28 million images in shards of 64 MiB
to nodes, ranks and workers, and from it the bytes that each node downloads, what has to be there before the first
batch, and how well samples are mixed.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.scale.order import compute, computed_page

BATCH, STEPS, WARMUP, PHOTOS = 16, 14, 3, 128
CANDIDATES = {"1 rank": (1, "ddp"), "2 ranks, DDP": (2, "ddp"), "2 ranks, FSDP2": (2, "fsdp2")}
SOURCES = ("synthetic", "streamed")
SHARES = (0.0, 0.5, 1.0)


def train_rank(out: Path, argv: list[str]) -> None:
    """One rank of a candidate: the seconds of its steps, called under Composer's launcher."""
    import torch
    from composer import Callback
    from composer.utils import dist

    from recipes import RECIPES
    from vitcomposer import config
    from vitcomposer.training.fit import fit

    torch.set_num_threads(1)

    class Clock(Callback):
        ends: list[tuple[float, float]] = []

        def batch_end(self, state: Any, logger: Any) -> None:
            self.ends.append((time.perf_counter(), time.process_time()))

    cfg = config.load(argv[0], argv[1:])
    trainer = RECIPES[cfg.recipe].build(cfg)
    trainer.state.callbacks.append(Clock())
    fit(trainer, cfg)
    (wall, cpu), (wall_end, cpu_end) = Clock.ends[WARMUP - 1], Clock.ends[-1]
    images = (len(Clock.ends) - WARMUP) * BATCH
    found = {"images": images, "wall": wall_end - wall, "cpu": cpu_end - cpu}
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(f"{out}.{dist.get_global_rank()}").write_text(json.dumps(found))


def measure_once(candidate: str, source: str, mds: Path, work: Path) -> dict[str, float]:
    """Images per second and per CPU second of a rank, the mean over the ranks."""
    ranks, parallelism = CANDIDATES[candidate]
    folder = Path(tempfile.mkdtemp(dir=work))
    overrides = ["model.image_size=96", "model.depth=4", "precision=fp32", "algorithms={}", "data.num_workers=0"]
    overrides += [f"global_train_batch_size={BATCH * ranks}", f"max_duration={STEPS}ba", "schedule.t_warmup=1ba"]
    overrides += ["augment.repeated_augmentation=1", "augment.rand_augment=null", "run.progress_bar=false"]
    overrides += ["run.eval_interval=1000ep", "run.save_interval=1000ep", f"run.folder={folder}", "run.name=scale"]
    overrides += [f"run.parallelism={parallelism}", f"model.num_classes={len(list((mds / 'classes').iterdir()))}"]
    if source == "synthetic":
        overrides += ["data.local=null", "data.source=synthetic", "data.synthetic_samples=10000"]
    else:
        overrides += [f"data.remote={mds / 'mds'}", f"data.local={folder / 'cache'}"]
    launch = [str(Path(sys.executable).parent / "composer"), "-n", str(ranks), "-m", "benchmarks.scale"]
    command = [*launch, "--rank", str(folder / "found"), str(ROOT / "yamls/deit_ti.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    found = [json.loads((folder / f"found.{rank}").read_text()) for rank in range(ranks)]
    return {
        "images_per_second": statistics.mean(each["images"] / each["wall"] for each in found),
        "images_per_cpu_second": statistics.mean(each["images"] / each["cpu"] for each in found),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in found),
    }


def build_data(work: Path) -> Path:
    """JPEG files like ImageNet's as an image folder and as small shards, so that a run streams several."""
    from benchmarks.input.photos import build_photos

    build_photos(work / "photos", "full", PHOTOS)
    for split in ("train", "val"):
        (work / "folder" / split).parent.mkdir(parents=True, exist_ok=True)
        (work / "folder" / split).symlink_to(work / "photos")
    (work / "classes").symlink_to(work / "photos")
    command = [sys.executable, "-m", "vitcomposer", "convert", "folder", str(work / "folder"), str(work / "mds")]
    subprocess.run([*command, "--workers", "2", "--shard-size", "1mb"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return work


def measure(number_of_rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        work = build_data(Path(folder))
        rounds: dict[str, list[dict[str, dict[str, float]]]] = {source: [] for source in SOURCES}
        for number in range(number_of_rounds):
            for source in SOURCES:
                names = list(CANDIDATES)
                turn = names[number % len(names) :] + names[: number % len(names)]
                rounds[source].append({name: measure_once(name, source, work, work) for name in turn})
                print(f"round {number + 1}, {source}", file=sys.stderr, flush=True)
    return {"rounds": rounds, "recompute": measure_recompute()}


def measure_recompute() -> dict[str, list[dict[str, float]]]:
    """Bytes that a forward pass keeps, and CPU seconds of a step, by the share of blocks that compute twice."""
    import torch

    from vitcomposer.models import build_model
    from vitcomposer.training.execution import recompute_activations

    torch.set_num_threads(1)
    model = build_model("vit_small_patch16", num_classes=1000, image_size=224, drop_path_rate=0.0).train()
    blocks: Any = model.blocks
    images = torch.randn(2, 3, 224, 224)

    def step(share: float) -> dict[str, float]:
        for block in blocks:
            block.recompute = False
        if share:
            recompute_activations(torch.nn.Sequential(model), share)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images).square().mean()
        held = sum(size for pointer, size in kept.items() if pointer not in own)
        model.zero_grad()
        begin = time.process_time()
        loss = model(images).square().mean()
        loss.backward()
        return {"bytes": held / len(images), "cpu_seconds": time.process_time() - begin}

    step(0.0)
    found: dict[str, list[dict[str, float]]] = {str(share): [] for share in SHARES}
    for _ in range(3):
        for share in SHARES:
            found[str(share)].append(step(share))
    return found


def page(report: dict[str, Any]) -> str:
    lines = [
        "# How a run grows",
        "",
        f"Written by `python -m benchmarks.scale`, {report['machine']}.",
    ]
    if "measured" in report:
        lines += measured_page(report["measured"])
    if "computed" in report:
        lines += computed_page(report["computed"])
    return "\n".join(lines) + "\n"


def measured_page(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Measured: two ranks against one, on two CPU cores",
        "",
        f"DeiT-Ti of 4 blocks at 96 pixels, {BATCH} images a rank and step, one thread a rank, {STEPS - WARMUP} steps "
        f"after {WARMUP}, rounds: {len(found['rounds']['streamed'])}; medians, smallest and largest ratio to one "
        "rank inside a round. The "
        "cores were shared with other work, which wall time contains and CPU time does not; a rank that waits for the "
        "other spins, and so pays with CPU time too. Streamed: JPEG files like ImageNet's from a folder into an empty "
        "cache, decoded by the rank itself.",
        "",
        "| images | candidate | images/s of a rank | of one rank | images per CPU second of a rank | of one rank |",
        "|---|---|---|---|---|---|",
    ]
    for source, rounds in found["rounds"].items():
        for name in CANDIDATES:
            cells = [source, name]
            for unit in ("images_per_second", "images_per_cpu_second"):
                ratios = [turn[name][unit] / turn["1 rank"][unit] for turn in rounds]
                cells.append(f"{statistics.median(turn[name][unit] for turn in rounds):.1f}")
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Activation checkpointing, ViT-S at 224 pixels, float32, one core: what a forward pass keeps for the backward "
        "one, and CPU seconds of a step against those without it in the same round.",
        "",
        "| run.activation_checkpointing | MB an image | of none | CPU time of a step |",
        "|---|---|---|---|",
    ]
    rows = found["recompute"]
    for share in rows:
        kept = rows[share][0]["bytes"]
        ratios = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(rows[share], rows["0.0"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {float(share):g} | {kept / 1e6:.1f} | {kept / rows['0.0'][0]['bytes']:.2f} | {spread} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="json; the page beside it ends in .md")
    parser.add_argument("--measure", action="store_true", help="this part alone; what the other found before stays")
    parser.add_argument("--compute", action="store_true", help="this part alone")
    parser.add_argument("--rounds", type=int, default=3, help="of what is measured (default: %(default)s)")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.rank:
        train_rank(args.rank, overrides)
        return
    if overrides:
        parser.error(f"unknown arguments: {overrides}")
    report: dict[str, Any] = {}
    if args.out and args.out.is_file():
        report = json.loads(args.out.read_text(encoding="utf-8"))
    report["machine"] = f"{os.cpu_count()} CPU cores, torch {version('torch')}, Python {platform.python_version()}"
    if args.compute or not args.measure:
        report["computed"] = compute()
    if args.measure or not args.compute:
        report["measured"] = measure(args.rounds)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(page(report), encoding="utf-8")
    print(page(report))


if __name__ == "__main__":
    main()
