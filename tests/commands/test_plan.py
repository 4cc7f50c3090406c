"""The plan of a recipe: the accounting of its stages, where its speed comes from, and what a user gets wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recipes import RECIPES
from vitcomposer import cli, config
from vitcomposer.cost import flops, roofline
from vitcomposer.cost.estimate import Network, Speed, View, costs_of
from vitcomposer.cost.gpus import GPUS

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 1_281_167


def planned(tmp_path: Path, name: str, *argv: str, gpu: str = "h200") -> dict[str, Any]:
    """What the command writes with --json for 8 GPUs, from the roofline."""
    file = tmp_path / "plan.json"
    command = ["plan", str(ROOT / f"yamls/{name}.yaml"), *argv, "--gpus", "8", "--gpu", gpu]
    assert cli.main([*command, "--results", str(tmp_path), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_deit_s_costs_what_the_arithmetic_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "deit_s", "--price", "2.5")
    assert found["parameters"] == 22_050_664
    assert found["steps"] == 300 * (IMAGES // 1024) and found["images_seen"] == found["steps"] * 1024
    assert found["epochs"] == found["equal_compute_epochs"] == 300
    assert found["train_flops_per_image"] == pytest.approx(27.6e9, rel=0.01)
    (stage,) = found["stages"]
    assert found["hours"] == pytest.approx(found["images_seen"] / stage["images_per_second"] / 3600)
    assert stage["mfu"] == pytest.approx(stage["images_per_second"] * 27.59e9 / (8 * 989.5e12), rel=0.01)
    assert stage["bytes_to_gpus_per_second"] == pytest.approx(stage["images_per_second"] * 3 * 224 * 224)
    assert found["cost"] == pytest.approx(2.5 * 8 * found["hours"])
    text = capsys.readouterr().out
    assert "roofline estimate, not measured" in text and "1,281,167 images (ImageNet-1k)" in text
    assert (
        "estimate (weights 0.1" in text and "cost" in text and "CPU cores for the images/s of the GPUs: unknown" in text
    )


def test_no_price_no_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(tmp_path, "deit_b", gpu="H100")["cost"] is None
    text = capsys.readouterr().out
    assert "cost" not in text and "105.4 GFLOP" in text and "8 x h100" in text


def test_convit_is_a_little_slower_for_each_flop_than_a_vit(tmp_path: Path) -> None:
    convit, vit = planned(tmp_path, "convit_s"), planned(tmp_path, "deit_s", "model.embed_dim=432")
    assert convit["train_flops_per_image"] == pytest.approx(34.5e9, rel=0.01)
    assert 0.85 < convit["stages"][0]["mfu"] / vit["stages"][0]["mfu"] < 1.0
    assert convit["basis"] == "roofline estimate, not measured"


def test_blocks_that_do_not_learn_cost_their_forward_pass_alone(tmp_path: Path) -> None:
    per_image = "train_flops_per_image"
    whole, head, third = (
        planned(tmp_path, "deit_s", f"init.train_blocks={blocks}", "init.weights=x")[per_image]
        for blocks in ("null", 0, 4)
    )
    assert (head / whole, third / whole) == (pytest.approx(1 / 3), pytest.approx((1 + 2 / 3) / 3))


def test_curriculum_costs_its_equal_compute_epochs(tmp_path: Path) -> None:
    found = planned(tmp_path, "vit_s_hot")
    stages = found["stages"]
    assert [stage["image_size"] for stage in stages] == [96, 160, 192, 224]
    assert sum(stage["steps"] for stage in stages) == found["steps"] == 704 * (IMAGES // 4096)
    # arXiv:2405.08768 counts 469 epochs of images at 195 of compute.
    assert found["epochs"] / found["equal_compute_epochs"] == pytest.approx(469 / 195, rel=0.01)
    total = found["train_flops"]
    shares = [stage["steps"] * 4096 * stage["train_flops_per_image"] / total for stage in stages]
    assert shares == pytest.approx([0.2, 0.4, 0.2, 0.2], abs=1e-3)
    factors = [stage["train_flops_per_image"] / found["train_flops_per_image"] for stage in stages]
    assert factors == pytest.approx([0.176, 0.493, 0.721, 1.0], rel=0.01)
    assert found["hours"] == pytest.approx(sum(stage["hours"] for stage in stages))
    assert found["memory_estimate"]["averages"] == 4 * found["parameters"]


def test_input_that_was_measured_gives_cores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"ours-ra": 400.0, "ours-seekable": 500.0}
    write_inputs(tmp_path, rates)
    found = planned(tmp_path, "deit_s")
    assert found["stages"][0]["cpu_cores"] == -(-found["stages"][0]["gpu_images_per_second"] // 400)
    assert "400 images per CPU second at full size (ours-ra; input_full.json)" in capsys.readouterr().out
    assert planned(tmp_path, "deit_s", "data.augment_on=device")["supply"]["images_per_cpu_second"] == 500


def write_inputs(folder: Path, rates: dict[str, float], *, file: str = "input_full.json") -> None:
    """As benchmarks.input does; a name ends with its size, or the size is 224."""
    sizes = {name: int((re.findall(r"-(\d+)$", name) or [224])[0]) for name in rates}
    candidates = {
        name: {"label": name, "images_per_cpu_second": {"median": rate}, "shapes": [[3, sizes[name], sizes[name]]]}
        | {"stored_bytes": 600_000 if name == "ours-raw" else 100_000}
        for name, rate in rates.items()
    }
    (folder / file).write_text(json.dumps({"candidates": candidates}))


def write_measured(folder: Path, *rows: tuple[float, float], device: str = "NVIDIA H200", width: int = 384) -> None:
    made = [
        {"who": "vitcomposer", "family": "vit", "width": width, "train_flops_per_image": cost, "mfu": mfu}
        for cost, mfu in rows
    ]
    made.append({**made[0], "who": "timm", "mfu": 0.9})
    (folder / "gpu_x.json").write_text(json.dumps({"device": device, "sections": {"training": made}}))


def test_measured_mfu_goes_before_the_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_measured(tmp_path, (27.593e9, 0.20), (4.856e9, 0.10))
    found = planned(tmp_path, "vit_s_hot")
    assert [stage["mfu"] for stage in found["stages"]] == sorted(stage["mfu"] for stage in found["stages"])
    assert found["stages"][0]["mfu"] == pytest.approx(0.10, rel=1e-3)
    assert found["stages"][-1]["mfu"] == pytest.approx(0.20, rel=1e-3)
    assert found["stages"][-1]["images_per_second"] == pytest.approx(8 * 0.2 * 989.5e12 / 27.593e9, rel=1e-3)
    assert "measured MFU of gpu_x.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "measured, argv",
    [
        ({"device": "NVIDIA H100 80GB HBM3"}, []),
        ({"width": 768}, []),
        ({}, ["precision=amp_fp16"]),
    ],
    ids=["another GPU", "another width", "another precision"],
)
def test_other_measurements_do_not_count(measured: dict[str, Any], argv: list[str], tmp_path: Path) -> None:
    write_measured(tmp_path, (27.6e9, 0.2), **measured)
    assert planned(tmp_path, "deit_s", *argv)["basis"] == "roofline estimate, not measured"


@pytest.mark.parametrize(
    "name, gpu, images_per_second, mfu, split",
    [
        ("vit_small_patch16", "a100", 4700, 0.42, None),
        ("vit_small_patch16", "h100", 10100, 0.28, None),
        ("vit_small_patch16", "h200", 11800, 0.33, (0.49, 0.12, 0.39)),
        ("vit_base_patch16", "a100", 1670, 0.56, None),
        ("vit_base_patch16", "h100", 3800, 0.41, None),
        ("vit_base_patch16", "h200", 4300, 0.46, (0.63, 0.09, 0.28)),
        ("vit_large_patch16", "a100", 533, 0.63, None),
        ("vit_large_patch16", "h100", 1260, 0.47, None),
        ("vit_large_patch16", "h200", 1390, 0.52, (0.68, 0.07, 0.25)),
    ],
)
def test_roofline_gives_the_reference_table(
    name: str, gpu: str, images_per_second: float, mfu: float, split: tuple[float, ...] | None, networks: Any
) -> None:
    network, view = networks[name], View(1, 224, 1.0)
    work, peak = network.work(view), GPUS[gpu].peak("amp_bf16")
    assert work is not None and peak is not None
    seconds = roofline.roofline_seconds(work, network.train_flops(view), GPUS[gpu], peak)
    assert 1 / sum(seconds) == pytest.approx(images_per_second, rel=0.02)
    assert network.train_flops(view) / sum(seconds) / peak == pytest.approx(mfu, abs=0.01)
    if split is not None:
        assert [part / sum(seconds) for part in seconds] == pytest.approx(split, abs=0.01)


@pytest.fixture(scope="module")
def networks() -> dict[str, Network]:
    import torch

    from vitcomposer.models import build_model

    with torch.device("meta"):
        names = ("vit_small_patch16", "vit_base_patch16", "vit_large_patch16")
        return {name: Network(build_model(name, num_classes=1000, image_size=224)) for name in names}


def test_crops_cost_the_sum_of_their_sizes(networks: dict[str, Network], tmp_path: Path) -> None:
    for name, gigaflops in (("vit_small_patch16", 84), ("vit_base_patch16", 326)):
        once = flops.multi_crop_flops(networks[name].module, [224] * 2 + [96] * 6)
        assert 3 * once == pytest.approx(gigaflops * 1e9, rel=0.01)
    speed = Speed(networks["vit_small_patch16"], "h200", "amp_bf16", tmp_path)
    large, small = speed.seconds(View(1, 224, 1.0)), speed.seconds(View(1, 96, 1.0))
    assert large is not None and small is not None
    assert speed.seconds(View(6, 96, 1.0)) == pytest.approx(6 * small) and small < 0.25 * large


def test_swav_counts_all_crops_and_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk = ["model.image_size=224", "model.patch_size=16", "model.embed_dim=384", "model.depth=12"]
    crops = ["crops.total_num_crops=8", "crops.num_crops=[2,6]", "crops.size_crops=[224,96]"]
    found = planned(tmp_path, "swav_demo", *trunk, "model.num_heads=6", *crops, "precision=amp_bf16")
    assert found["train_flops_per_image"] == pytest.approx(84e9, rel=0.01)
    small = ["head.dims=[384,256,32]", "head.num_clusters=[64]"]
    found = planned(tmp_path, "swav_demo", *trunk, "model.num_heads=6", *crops, "precision=amp_bf16", *small)
    head = ["head.dims=[384,2048,128]", "head.num_clusters=[3000]"]
    with_head = planned(tmp_path, "swav_demo", *trunk, "model.num_heads=6", *crops, "precision=amp_bf16", *head)
    added = 3 * 8 * 2 * (384 * 2048 + 2048 * 128 + 128 * 3000 - 384 * 256 - 256 * 32 - 32 * 64)
    assert with_head["train_flops_per_image"] - found["train_flops_per_image"] == added
    assert with_head["hours"] > found["hours"]
    assert "crops, 2 of 224 px and 6 of 96 px" in capsys.readouterr().out


def test_memory_follows_gpus_micro_batch_and_optimizer(tmp_path: Path) -> None:
    def memory(gpus: int, *overrides: str) -> dict[str, float]:
        cfg = config.load(ROOT / "yamls/vit_s.yaml", overrides)
        return costs_of(cfg, gpu="h200", gpus=gpus, images=IMAGES, results=tmp_path)["memory_estimate"]

    one, eight = memory(1), memory(8)
    assert one["activations"] == pytest.approx(8 * eight["activations"])
    assert eight["gradients"] == 2 * one["gradients"] == 2 * one["weights"]
    assert memory(1, "run.device_train_microbatch_size=128") == {
        **eight,
        "gradients": one["gradients"],
        "total": eight["total"] - one["gradients"],
    }
    assert memory(1, "optimizer.name=sgd")["optimizer"] == one["optimizer"] / 2


RATES = {"ours-ra": 393.0, "ours-seekable": 475.0, "ours-raw": 1173.0}


def test_hours_are_those_of_the_slower_of_gpu_decode_and_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of vit_s_mild: its 96-px stage asks for more images than 192 cores decode."""
    write_inputs(tmp_path, RATES)
    found = planned(tmp_path, "vit_s_mild", "--cpus", "192", "--price", "2")
    assert (found["gpu_bound_hours"], found["hours"]) == (
        pytest.approx(0.20, abs=0.005),
        pytest.approx(0.63, abs=0.005),
    )
    assert found["gpu_hours"] == pytest.approx(8 * found["hours"]) and found["cost"] == pytest.approx(
        2 * found["gpu_hours"]
    )
    first = found["stages"][0]
    assert first["limited_by"] == "decode" and first["images_per_second"] == pytest.approx(192 * 393)
    assert first["cpu_cores"] == pytest.approx(1460, abs=2)
    assert found["workers"] is None, "auto takes all cores but one of each GPU"
    assert {change["change"] for change in found["changes"]} == {
        "384 CPU cores",
        "vitcomposer convert --raw-fraction 1",
        "data.augment_on=device",
    }
    text = capsys.readouterr().out
    assert "0.63 h on 8 x h200 with 192 CPU cores" in text and "0.20 h if the GPUs never waited" in text
    few = planned(tmp_path, "vit_s_mild", "--cpus", "192", "data.num_workers=8")
    assert few["workers"] == {"now": 8, "wanted": 24, "cores_at_work": 64, "hours": pytest.approx(1.88, abs=0.01)}
    assert "do    data.num_workers=24 (now 8, for each GPU)" in capsys.readouterr().out
    many = planned(tmp_path, "vit_s_mild", "--cpus", "800")  # more than auto takes for a GPU
    assert many["workers"]["now"] == 32 and many["workers"]["wanted"] == 100

    read = planned(tmp_path, "vit_s_mild", "--cpus", "192", "--disk-gbps", "8")  # 1 GB/s
    assert {stage["limited_by"] for stage in read["stages"]} == {"disk"}
    assert read["hours"] == pytest.approx(read["images_seen"] * 100_000 / 1e9 / 3600)
    assert read["changes"][0]["change"].startswith("a disk of 57.3 GB/s")
    assert "and 1 GB/s of disk" in capsys.readouterr().out


def test_what_changes_the_input_is_what_it_was_promised_to_be(tmp_path: Path) -> None:
    """Device augmentation and raw pixels, planned as named, take the hours that the advice gave."""
    write_inputs(tmp_path, RATES)
    found = planned(tmp_path, "vit_s_mild", "--cpus", "192")
    hours = {change["change"]: change["hours"] for change in found["changes"]}
    device = planned(tmp_path, "vit_s_mild", "--cpus", "192", "data.augment_on=device")["hours"]
    assert hours["data.augment_on=device"] == pytest.approx(device)
    assert hours["384 CPU cores"] == pytest.approx(planned(tmp_path, "vit_s_mild", "--cpus", "384")["hours"])
    write_inputs(tmp_path, {"ours-ra": 1 / (1 / 393 + 1 / 1173 - 1 / 475)})
    assert hours["vitcomposer convert --raw-fraction 1"] == pytest.approx(
        planned(tmp_path, "vit_s_mild", "--cpus", "192")["hours"]
    )


SMALL = {"ours-whole-224": 1900.0, "ours-whole-96": 2000.0, "ours-small-96": 12000.0}  # by a machine four times as fast


def test_small_stages_cost_what_was_measured_of_them_scaled_to_the_machine(tmp_path: Path) -> None:
    """From the column that convert --for makes, else from whole images; augmentation is added in full."""
    write_inputs(tmp_path, RATES)
    write_inputs(tmp_path, SMALL, file="input_small_full.json")
    augmentation = 1 / 393 - 1 / 475
    words = ("vit_s_mild", "--cpus", "192")
    for key, rate in (("true", 12000), ("false", 2000)):
        found = planned(tmp_path, *words, f"augment.low_resolution_stages={key}")
        first, *others = found["stages"]
        assert first["limits"]["decode"] == pytest.approx(192 / (1900 / 475 / rate + augmentation))
        assert others[-1]["limits"]["decode"] == pytest.approx(192 * 393), "224 px: as they were measured"
        device = next(change for change in found["changes"] if change["change"] == "data.augment_on=device")
        more = [f"augment.low_resolution_stages={key}", "data.augment_on=device"]
        assert device["hours"] == pytest.approx(planned(tmp_path, *words, *more)["hours"])


def test_small_images_are_a_change_where_the_data_set_has_none(photo_mds: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path, RATES)
    write_inputs(tmp_path, SMALL, file="input_small_full.json")
    words = ("vit_s_mild", "--cpus", "192", "global_train_batch_size=16")
    found = planned(tmp_path, *words, f"data.local={photo_mds}")
    (change,) = (c for c in found["changes"] if c["change"] == "vitcomposer convert --for this yaml")
    made = planned(tmp_path, *words, "--images", str(found["images"]))
    assert change["hours"] == pytest.approx(made["hours"]) and change["hours"] < 0.8 * found["hours"]


def test_without_cpus_the_cores_of_this_machine_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path, RATES)
    monkeypatch.setattr("vitcomposer.commands.plan.plan.usable_cores", lambda: 3)
    found = planned(tmp_path, "deit_s")
    assert found["cpus"] == 3 and found["cpus_from"] == "this machine"
    assert found["hours"] == pytest.approx(planned(tmp_path, "deit_s", "--cpus", "3")["hours"])
    assert "with 3 CPU cores of this machine (--cpus N for another)" in capsys.readouterr().out


def test_bytes_are_those_of_the_data_set(photo_mds: Path, tmp_path: Path) -> None:
    small = ["global_train_batch_size=16", "augment.repeated_augmentation=1", f"data.local={photo_mds}"]
    found = planned(tmp_path, "deit_s", *small, "--cpus", "4")
    written = sum(path.stat().st_size for path in (photo_mds / "train").glob("*.mds"))
    assert found["bytes_per_image"] == pytest.approx(written / 192)
    assert found["bytes_per_image_from"] == "the index of the data set"
    unknown = planned(tmp_path, "deit_s", "--cpus", "4")
    assert (unknown["bytes_per_image"], unknown["bytes_per_image_from"]) == (110_000, "the mean of ImageNet-1k")


@pytest.mark.parametrize("recipe", ["probe_linear", "probe_knn"])
def test_recipe_that_trains_no_network_has_no_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(ROOT / f"yamls/{recipe}.yaml"), "--gpu", "h200"]) == 2
    assert "recipe must be one that trains a network" in capsys.readouterr().err


def test_network_without_layers_that_are_known_has_no_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "deit_s", "model.name=mean_color", "model.drop_path_rate=0")
    assert found["hours"] is None and found["gpu_hours"] is None and found["basis"] is None
    assert "hours: unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--gpu", "h300"], "--gpu must be one of gb200, b200, h200"),
        (["--gpu", "h20"], "Did you mean 'h200'?"),
        (["--gpu", "h200", "--gpus", "0"], "--gpus must be 1 or more, got 0"),
        (["--gpu", "h200", "--gpus", "3"], "global_train_batch_size must be divisible by --gpus 3, got 1024"),
        (["--gpu", "h200", "--images", "1000"], "--images must be at least global_train_batch_size=1024, got 1000"),
        (["--gpu", "h200", "--price", "-1"], "--price must be 0 or more an hour"),
        (["--gpu", "h200", "--cpus", "0"], "--cpus must be 1 or more, got 0"),
        (["--gpu", "h200", "--disk-gbps", "0"], "--disk-gbps must be above 0, got 0.0"),
        (["--gpu", "h200", "--network-gbps", "nan"], "--network-gbps must be above 0, got nan"),
        (["precision=amp_bf16", "--gpu", "v100"], "precision must be one that a v100 has, got 'amp_bf16'"),
        (["max_duration=300", "--gpu", "h200"], "max_duration must be a time string"),
        (["model.name=deit_s", "--gpu", "h200"], "model.name must be a known model, got 'deit_s'"),
        (["algorithms.Curriculum={image_sizes: [96, 224]}", "--gpu", "h200"], "algorithms.Curriculum.compute"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(ROOT / "yamls/deit_s.yaml"), *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "yamls").glob("*.yaml")))
def test_every_yaml_has_a_plan_or_says_why_not(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("probe_"):
        assert cli.main(["plan", str(ROOT / f"yamls/{name}.yaml"), "--gpu", "h200"]) == 2
        assert "recipe must be one that trains a network" in capsys.readouterr().err
        return
    found = planned(tmp_path, name)
    assert found["train_flops"] > 0 and found["steps"] > 0 and found["parameters"] > 0
    assert found["hours"] is None or found["hours"] > 0


@pytest.mark.parametrize("method", ["swav", "simclr", "moco", "dino"])
def test_plan_counts_what_the_task_counts(method: str, tmp_path: Path) -> None:
    """All heads that are built, those of a momentum encoder too."""
    page = ROOT / ("yamls/swav_demo.yaml" if method == "swav" else f"tests/self_supervised/{method}_digits.yaml")
    cfg = config.load(page)
    task: Any = RECIPES[method]
    counted = task.build_task(cfg).train_flops_per_image(cfg.crops.sizes)
    found = costs_of(cfg, gpu="h200", gpus=1, images=1438, results=tmp_path)
    assert found["train_flops_per_image"] == pytest.approx(counted, rel=1e-9)


def test_heads_of_moco_and_dino_are_counted(tmp_path: Path) -> None:
    moco = planned(tmp_path, "moco3_vit_s")["train_flops_per_image"]
    assert moco == pytest.approx(73.91e9, abs=0.005e9)
    small, large = (planned(tmp_path, "dino_vit_s", f"head.out_dim={k}")["train_flops_per_image"] for k in (1000, 2000))
    crops = sum(config.load(ROOT / "yamls/dino_vit_s.yaml").crops.num_crops)
    assert large - small == pytest.approx((3 * crops + 2) * 2 * 256 * 1000)


def test_plan_reads_the_number_of_images_of_the_data(
    photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["global_train_batch_size=16", "augment.repeated_augmentation=1"]
    assert planned(tmp_path, "deit_s", f"data.local={photo_mds}", *small)["images"] == 8 * 24
    assert "192 images, 12 steps of 16 an epoch" in capsys.readouterr().out
    assert planned(tmp_path, "deit_s", f"data.local={photo_mds}", "--images", "320", *small)["images"] == 320
    synthetic = ["data.source=synthetic", "data.synthetic_samples=4096"]
    assert planned(tmp_path, "deit_s", *synthetic)["images"] == 4096
    assert planned(tmp_path, "deit_s")["images"] == IMAGES
    (tmp_path / "train").mkdir()
    (tmp_path / "train/index.json").write_text("{")
    assert cli.main(["plan", str(ROOT / "yamls/deit_s.yaml"), f"data.local={tmp_path}", "--gpu", "h200"]) == 2
    assert "must be the index of an MDS data set" in capsys.readouterr().err
