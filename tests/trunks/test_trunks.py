"""Networks of timm by ``model.name: timm/NAME``: trained, resumed, averaged, exported; layers, attention, refusals."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from torch import Tensor, nn

from recipes import RECIPES
from tests.conftest import ROOT, error_of
from tests.trunks.networks import BEGIN, CLASSES, END, NETWORKS, build, check, load, train
from vitcomposer import config, optim
from vitcomposer.cli import main
from vitcomposer.cost.flops import forward_flops
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model
from vitcomposer.models.attention import has_attention, observe_attention
from vitcomposer.models.batch_norm import _convert
from vitcomposer.models.features import FrozenFeatures
from vitcomposer.models.trunks import Trunk, blocks_in, pooled_width
from vitcomposer.training.fit import fit

BY_NAME = {network.name: network for network in NETWORKS}
FAST = ("vit_wee_patch16_reg1_gap_256", "vit_small_patch16_dinov3", "resnet18")
PAGE = str(ROOT / "yamls/finetune_photos.yaml")


def small(name: str, **options: Any) -> Trunk:
    torch.manual_seed(0)
    size = {"depth": 2, "embed_dim": 48, "num_heads": 3} if name.startswith(("vit_", "beit", "deit")) else {}
    network = build_model(f"timm/{name}", **{"num_classes": CLASSES, "image_size": 64, **size, **options})
    assert isinstance(network, Trunk)
    return network


@pytest.mark.parametrize("name", FAST)
def test_network_trains_resumes_averages_and_exports(name: str, tmp_path: Path) -> None:
    check(BY_NAME[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_every_network_does_what_the_page_says(name: str, tmp_path: Path) -> None:
    """The rows of docs/trunks.md; ``python -m tests.trunks.networks`` writes them."""
    row = check(BY_NAME[name], tmp_path)
    row.pop("ONNX")  # the last digits are the machine's
    said = next(line for line in table_of_page() if line["`model.name`"] == f"`timm/{name}`")
    assert {key: said[key] for key in row} == row


def table_of_page() -> list[dict[str, str]]:
    text = (ROOT / "docs/trunks.md").read_text().partition(BEGIN)[2].partition(END)[0]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_page_has_a_row_for_each_network() -> None:
    assert [row["`model.name`"] for row in table_of_page()] == [f"`timm/{name}`" for name in BY_NAME]
    assert len(BY_NAME) >= 40


def test_it_is_the_network_of_the_same_name_of_ours() -> None:
    """Same weights, same logits, same cost: timm's names are ours."""
    size = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5, "image_size": 64}
    ours = build_model("deit_tiny_patch16", **size).eval()
    theirs = build_model("timm/deit_tiny_patch16_224", **size).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(images), ours(images), atol=1e-6, rtol=1e-5)
    assert forward_flops(theirs, 64) == forward_flops(ours, 64)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "resnet18", "swin_tiny_patch4_window7_224"])
def test_layers_learn_at_timms_rates(name: str) -> None:
    network = BY_NAME[name]
    model = build(network)
    factors = optim.layer_lrs(model, 1.0, 0.5)
    groups = optim.param_groups(model, 0.05, layer_lrs=factors)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ours = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    options: Any = timm.optim
    theirs = options.param_groups_layer_decay(
        model, 0.05, layer_decay=0.5, no_weight_decay_list=tuple(model.no_weight_decay())
    )
    assert ours == {names[p]: (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    assert len({rate for rate, _ in ours.values()}) == model.num_layer_groups > 3


@pytest.mark.parametrize("name", ["vit_wee_patch16_reg1_gap_256", "resnet18", "convnext_atto"])
@pytest.mark.parametrize("train_blocks", [0, 1])
def test_only_the_last_groups_and_the_head_learn(name: str, train_blocks: int) -> None:
    model = build(BY_NAME[name]).train()
    model.freeze_below(train_blocks)
    running = {key: value.clone() for key, value in model.named_buffers() if "running" in key}
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    learning = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    last = model.num_layer_groups - 1
    heads = {key for key, _ in model.named_parameters() if model.is_head(key)}
    wanted = heads | {key for key, layer in model.of_timm.layers.items() if train_blocks and layer >= last - 1}
    assert learning == wanted and heads and wanted != set(model.of_timm.layers)
    moved = {key for key, value in model.named_buffers() if key in running and not torch.equal(value, running[key])}
    assert all(model.of_timm.layers[f"{key.rpartition('.')[0]}.weight"] >= last - 1 for key in moved)
    assert not moved or train_blocks


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"init.train_blocks must be at most 8, timm's groups.*got 9"):
        small("resnet18").freeze_below(9)


def unfused_maps(model: Any, images: Tensor) -> list[Tensor]:
    """What timm's own softmax gives to its dropout of attention, block by block."""
    model = copy.deepcopy(model).eval()
    found: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(images)
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("vit_wee_patch16_reg1_gap_256", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"),
        *("beit_base_patch16_224", "vit_base_patch16_siglip_224", "naflexvit_base_patch16_gap"),
    ],
)
def test_attention_is_what_timm_computes(name: str) -> None:
    """With rotations, biases and a head that attends."""
    model, images = build(BY_NAME[name]), torch.randn(2, 3, 64, 64)
    modes = [module.training for module in model.modules()]
    blocks = observe_attention(model, images, lambda block: block)
    expected = unfused_maps(model, images)
    assert [module.training for module in model.modules()] == modes and len(blocks) == len(expected) == 2
    for block, attention in zip(blocks, expected, strict=True):
        torch.testing.assert_close(block.map, attention, atol=1e-6, rtol=1e-4)
        assert block.grid == (4, 4) and block.map.shape[-1] == 16 + block.num_prefix_tokens


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "cait_xxs24_224"])
def test_networks_without_attention_over_all_tokens_say_so(name: str) -> None:
    model = build(BY_NAME[name])
    assert not has_attention(model)
    with pytest.raises(ValueError, match="or a network of timm of their shape, to show its attention"):
        observe_attention(model, torch.randn(1, 3, 64, 64), lambda block: block)


def test_features_of_a_vit_by_name() -> None:
    model, images = build(BY_NAME["vit_small_patch16_dinov3"]), torch.randn(2, 3, 64, 64)
    features = FrozenFeatures(model, ["lastCLS", "concatCLS2", "mean", "pooled"])
    found = features(images)
    assert {name: value.shape[1] for name, value in found.items()} == features.widths
    tokens = model.forward_features(images)
    torch.testing.assert_close(found["mean"], tokens[:, 5:].mean(1))
    torch.testing.assert_close(found["concatCLS2"][:, 48:], tokens[:, 0])
    with pytest.raises(ConfigError, match="must be pooled for a ResNetTrunk, got 'mean'"):
        FrozenFeatures(build(BY_NAME["resnet18"]), ["mean"])


def test_features_before_the_head_may_be_wider() -> None:
    model = small("mobilenetv3_small_050", num_classes=0)
    assert pooled_width(model) == 1024 != model.num_features
    assert FrozenFeatures(model, ["pooled"])(torch.randn(1, 3, 64, 64))["pooled"].shape == (1, 1024)


def test_blocks_are_each_called_once() -> None:
    assert [len(blocks_in(small(name))) for name in ("vit_tiny_patch16_224", "resnet18")] == [2, 8]


def test_batch_norms_of_timm_keep_their_activation_across_ranks() -> None:
    model = small("efficientnet_b0").eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    assert torch.equal(_convert(copy.deepcopy(model), None)(images), expected)


REFUSALS = {
    "model.name=timm/vit_smal_patch16_224": "model.name must be a network that timm .* has, got "
    "'timm/vit_smal_patch16_224'. Did you mean 'vit_small_patch16_224'?",
    "model.arguments={no_such: 1}": "model.no_such must be left out for timm/vit_tiny_patch16_224, which has no",
    "model.image_size=60": "model.image_size must be one that timm/vit_tiny_patch16_224 takes, got 60. It says:",
    "model.num_heads=5": "model.name=timm/vit_tiny_patch16_224 must get values that timm accepts",
    "model.weight_init=moco3": "model.weight_init must be null for timm/vit_tiny_patch16_224",
    "model.arguments={pretrained: true}": "model.arguments.pretrained must be left out, got True",
    "model.arguments={img_size: 32}": "model.arguments.img_size must be left out, got 32. Set model.image_size.",
    "model.arguments={reg_tokens: 100000}": "model.arguments.reg_tokens must be text, a number up to 65536",
    "evaluation.image_size=72": "evaluation.image_size must be divisible by 16",
    "run.activation_checkpointing=1 model.name=timm/resnet18": "run.activation_checkpointing must be 0 for a network "
    "with batch norms",
    "optimizer.layer_decay=0.5 model.name=timm/poolformer_s12": "optimizer.layer_decay must be 1 for",
    "evaluation.image_size=96 model.name=timm/beit_base_patch16_224": "evaluation.image_size must be a size that "
    "timm/beit_base_patch16_224 takes, got 96",
    "run.attention_interval=1ep model.name=timm/resnet18": "run.attention_interval must be null for timm/resnet18",
}


@pytest.mark.parametrize("given", REFUSALS)
def test_what_cannot_be_is_refused_in_a_line(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    page = ["model.name=timm/vit_tiny_patch16_224", "model.image_size=64", "model.num_classes=5", "init.weights=null"]
    page += [
        "data.source=synthetic",
        "data.synthetic_samples=16",
        "global_train_batch_size=4",
        f"run.folder={tmp_path}",
    ]
    depth = ["model.depth=1"] if "vit" in given or "name" not in given else []
    changes = re.split(r" (?=\w+\.)", given)
    assert main(["train", PAGE, *page, *depth, *changes]) == 2
    assert re.search(REFUSALS[given], error_of(capsys.readouterr().err))


def test_wrong_keys_are_told_without_timm_or_torch() -> None:
    program = (
        "import sys\nfrom vitcomposer import config\nfrom vitcomposer.errors import ConfigError\n"
        f"try: config.load({PAGE!r}, ['model.name=timm/resnet18', 'model.drop_path=1', 'model.num_classes=3'])\n"
        "except ConfigError as error: print(error)\n"
        "assert not {'torch', 'timm', 'composer'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and "model.drop_path" in done.stdout, done.stderr


def test_image_sizes_grow_over_the_epochs(tmp_path: Path) -> None:
    stages = "algorithms.Curriculum={image_sizes: [32, 64], compute: [0.5, 0.5]}"
    network = BY_NAME["vit_wee_patch16_reg1_gap_256"]
    train(load(network, tmp_path, "grows", [stages, "max_duration=4ba", "model.image_size=64"]))
    with pytest.raises(ConfigError, match=r"must be a size that timm/beit_base_patch16_224 takes, got 32"):
        RECIPES["supervised"].build(load(BY_NAME["beit_base_patch16_224"], tmp_path, "fixed", [stages]))


# A recipe's page and what makes it a run of two steps on images made of a seed.
_TINY = ["data.source=synthetic", "data.synthetic_samples=16", "data.num_workers=0", "precision=fp32"]
_TINY += ["run.progress_bar=false", "run.output=quiet", "evaluation.global_batch_size=8"]
_STEPS = ["max_duration=2ba", "global_train_batch_size=4", "schedule.t_warmup=0ba"]
_CROPS = ["monitor=null", "crops.total_num_crops=2", "crops.num_crops=[2]", "crops.size_crops=[64]"]
_CROPS += ["crops.crop_scales=[[0.4, 1.0]]", "crops.blur_prob=[0.0]", "crops.solarize_prob=[0.0]"]
_OF_OURS = ["model.weight_init=null", "model.position_embedding=null"]
RECIPE_RUNS: dict[str, tuple[str, list[str]]] = {
    "probe": ("probe_linear", ["model.num_classes=5", "heads.features=[pooled]", *_STEPS]),
    "knn": ("probe_knn", ["knn.k=[2]", "evaluation.image_size=null"]),
    "dino": ("dino_vit_s", [*_STEPS, *_CROPS, "head.out_dim=32", "loss.freeze_last_layer_epochs=0.0"]),
    "simclr": ("simclr_vit_b", [*_STEPS, "monitor=null", "head.dims=[WIDTH, 32, 16]"]),
    "moco": (
        "moco3_vit_s",
        [*_STEPS, *_OF_OURS, "monitor=null", "head.projector_dims=[WIDTH, 32, 16]", "head.predictor_dims=[16, 32, 16]"],
    ),
    "swav": ("swav_deit_s", [*_STEPS, *_CROPS, "head.dims=[WIDTH, 32, 16]", "head.num_clusters=[8]"]),
}


@pytest.mark.parametrize("recipe", RECIPE_RUNS)
def test_every_recipe_takes_a_network_of_timm(recipe: str, tmp_path: Path) -> None:
    page, more = RECIPE_RUNS[recipe]
    network = BY_NAME["vit_wee_patch16_reg1_gap_256"]
    own = [each for each in network.overrides if "num_classes" not in each]
    more = [each.replace("WIDTH", "48") for each in more]
    overrides = [*own, *_TINY, *more, "init.weights=null", f"run.folder={tmp_path}", "run.name=run"]
    cfg = config.load(ROOT / f"yamls/{page}.yaml", overrides)
    trainer = RECIPES[recipe].build(cfg)
    assert fit(trainer, cfg) == 0
    trainer.close()


def test_a_network_of_timm_teaches(tmp_path: Path) -> None:
    teacher = small("resnet18", num_classes=CLASSES)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    network = BY_NAME["vit_wee_patch16_reg1_gap_256"]
    overrides = [*network.overrides, *_TINY, *_STEPS, f"run.folder={tmp_path}", "run.name=run"]
    overrides += ["teacher.name=timm/resnet18", f"teacher.weights={tmp_path / 'teacher.pth'}"]
    overrides += ["optimizer.no_weight_decay=null", "augment.repeated_augmentation=1", "run.eval_interval=2ba"]
    cfg = config.load(ROOT / "yamls/deit_s_distilled.yaml", overrides)
    trainer = RECIPES["distill"].build(cfg)
    assert fit(trainer, cfg) == 0
    trainer.close()


def test_a_copy_recomputes_with_its_own_weights() -> None:
    from vitcomposer.training.execution import recompute_activations

    model = small("vit_tiny_patch16_224").train()
    recompute_activations(nn.Sequential(model), 1.0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    images = torch.randn(2, 3, 64, 64)
    assert not twin(images).any() and bool(model(images).any())
