"""Networks of timm for the tests, small by timm's own arguments, and what a run of one has to show."""

import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes import RECIPES
from tests.conftest import ROOT
from vitcomposer import config
from vitcomposer.cost.flops import forward_flops
from vitcomposer.evaluation.trained import load_each, load_trained
from vitcomposer.export.folder import write_folder
from vitcomposer.models import build_model
from vitcomposer.models.attention import has_attention, observe_attention
from vitcomposer.models.trunks import Trunk
from vitcomposer.models.weights.load import read_checkpoint
from vitcomposer.training.execution import recompute_activations
from vitcomposer.training.fit import fit

CLASSES = 5
VIT = "depth=2 embed_dim=48 num_heads=3"
DIMS = "arguments.depths=[1,1,2,1] arguments.dims=[16,24,32,48]"
SWIN = "arguments.depths=[1,1,2,1] embed_dim=24 arguments.num_heads=[1,2,4,8]"
LAYERS = "arguments.layers=[1,1,1,1]"


@dataclass(frozen=True)
class Network:
    """A name of timm, the size of its images, and what makes it small, as keys of the block ``model``."""

    family: str
    name: str
    image_size: int = 64
    small: str = ""

    @property
    def overrides(self) -> list[str]:
        """On a yaml."""
        given = [f"name=timm/{self.name}", f"image_size={self.image_size}", f"num_classes={CLASSES}"]
        return [f"model.{each}" for each in (*given, *self.small.split())]


NETWORKS = (
    Network("ViT", "vit_tiny_patch16_224", small=VIT),
    Network("ViT, registers", "vit_wee_patch16_reg1_gap_256", small=VIT),
    Network("ViT, patch 14", "vit_small_patch14_dinov2", 56, VIT),
    Network("DINOv2", "vit_small_patch14_reg4_dinov2", 56, VIT),
    Network("DeiT", "deit_tiny_patch16_224", small=VIT),
    Network("DeiT, distilled", "deit_tiny_distilled_patch16_224", small=VIT),
    Network("DeiT III", "deit3_small_patch16_224", small=VIT),
    Network("ViT, RoPE", "vit_small_patch16_rope_224", small=VIT),
    Network("ViT, RoPE mixed", "vit_small_patch16_rope_mixed_224", small=VIT),
    Network("ViT, RoPE and registers", "vit_medium_patch16_rope_reg1_gap_256", small=VIT),
    Network("DINOv3", "vit_small_patch16_dinov3", small=VIT),
    Network("DINOv3", "vit_small_plus_patch16_dinov3", small=VIT),
    Network("EVA", "eva02_tiny_patch14_224", 56, VIT),
    Network("EVA", "eva_large_patch14_196", 56, VIT),
    Network("PE", "vit_pe_core_tiny_patch16_384", small=VIT),
    Network("BEiT", "beit_base_patch16_224", small=VIT),
    Network("BEiT v2", "beitv2_base_patch16_224", small=VIT),
    Network("CLIP", "vit_base_patch32_clip_224", small=VIT),
    Network("SigLIP", "vit_base_patch16_siglip_224", small=VIT),
    Network("SigLIP, mean", "vit_base_patch16_siglip_gap_224", small=VIT),
    Network("SigLIP 2", "vit_base_patch16_siglip_gap_256", small=VIT),
    Network("NaFlex", "naflexvit_base_patch16_gap", small=VIT),
    Network("NaFlex", "naflexvit_base_patch16_siglip", small=VIT),
    Network("CaiT", "cait_xxs24_224", small=VIT),
    Network("XCiT", "xcit_nano_12_p16_224", small="depth=2"),
    Network("Swin", "swin_tiny_patch4_window7_224", small=SWIN),
    Network("Swin v2", "swinv2_tiny_window8_256", small=SWIN),
    Network("MaxViT", "maxvit_pico_rw_256", small="arguments.depths=[1,1,1,1]"),
    Network("CoAtNet", "coatnet_pico_rw_224", small="arguments.depths=[1,1,2,1]"),
    Network("Hiera", "hiera_tiny_224", small="arguments.stages=[1,1,2,1]"),
    Network("ConvNeXt", "convnext_atto", small=DIMS),
    Network("ConvNeXt v2", "convnextv2_atto", small=DIMS),
    Network("ConvNeXt", "convnext_zepto_rms", small=DIMS),
    Network("ResNet", "resnet18", small=LAYERS),
    Network("ResNet", "resnet50", small=LAYERS),
    Network("ResNet", "resnet26d", small=LAYERS),
    Network("ResNet v2", "resnetv2_50", small=LAYERS),
    Network("ResNeXt", "resnext50_32x4d", small=LAYERS),
    Network("SE-ResNet", "seresnet18", small=LAYERS),
    Network("RegNet", "regnety_002"),
    Network("EfficientNet", "efficientnet_b0"),
    Network("EfficientNet, lite", "efficientnet_lite0"),
    Network("EfficientNet v2", "tf_efficientnetv2_b0"),
    Network("MobileNet v2", "mobilenetv2_050"),
    Network("MobileNet v3", "mobilenetv3_small_050"),
    Network("MobileNet v4", "mobilenetv4_conv_small_035"),
    Network("MobileViT", "mobilevit_xxs"),
    Network("FastViT", "fastvit_t8"),
    Network("EdgeNeXt", "edgenext_xx_small"),
)

# A rate that does not change, so that a run of one step and one of two agree in the first.
_RUN = [
    *("data.source=synthetic", "data.synthetic_samples=16", "data.num_workers=0", "precision=fp32"),
    *("global_train_batch_size=4", "evaluation.global_batch_size=8", "init.weights=null", "optimizer.lr=1e-3"),
    *("schedule.t_warmup=0ba", "schedule.alpha_i=1", "schedule.alpha_f=1", "run.save_interval=1ba"),
    *("run.eval_interval=2ba", "run.progress_bar=false", "run.log_interval=1ba", "run.output=quiet"),
]
_EMA = "algorithms.EMA={half_life: null, smoothing: 0.5, update_interval: 1ba}"


def load(network: Network, folder: Path, name: str, more: Sequence[str] = ()) -> Any:
    """A fine-tuning of the network on images made of a seed."""
    overrides = [
        *network.overrides,
        "model.drop_path_rate=0.1",
        *_RUN,
        _EMA,
        f"run.folder={folder}",
        f"run.name={name}",
        *more,
    ]
    if not has_layers(network):
        overrides.append("optimizer.layer_decay=1")
    return config.load(ROOT / "yamls/finetune_photos.yaml", overrides)


def has_layers(network: Network) -> bool:
    """Whether timm groups the parameters of the network by depth."""
    return build(network).num_layer_groups > 0


def build(network: Network) -> Trunk:
    """The network alone, with weights of a seed; a head that is zero would hide what comes before it."""
    from vitcomposer.schema import Model

    torch.manual_seed(0)
    blocks = config.load(ROOT / "yamls/finetune_photos.yaml", [*network.overrides, *_RUN]).model
    assert isinstance(blocks, Model)
    model = build_model(**blocks.options())
    assert isinstance(model, Trunk)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def train(cfg: Any) -> Path:
    """Through the real Trainer; returns the run folder."""
    trainer = RECIPES["supervised"].build(cfg)
    assert fit(trainer, cfg) == 0
    trainer.close()
    return Path(cfg.run.folder, cfg.run.name)


def state(run: Path) -> dict[str, Tensor]:
    """Weights, optimizer and average in a run's newest checkpoint."""
    found = read_checkpoint(run / "checkpoints/latest-rank0.pt")["state"]
    flat: dict[str, Tensor] = {}

    def gather(prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            flat[prefix] = value
        pairs = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        for key, below in pairs:
            gather(f"{prefix}.{key}", below)

    for part in ("model", "optimizers", "algorithms"):
        gather(part, found[part])
    return flat


def recomputes_alike(model: nn.Module, images: Tensor) -> bool:
    """Whether gradients stay bit for bit where activations are computed twice; False where that is refused."""
    from vitcomposer.errors import ConfigError

    def gradients() -> list[Tensor | None]:
        torch.manual_seed(1)
        model.zero_grad()
        model(images).square().mean().backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    model.train()
    plain = gradients()
    try:
        recompute_activations(nn.Sequential(model), 1.0)
    except ConfigError:
        return False
    pairs = zip(plain, gradients(), strict=True)
    assert all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
    return True


def is_one_graph(model: nn.Module, images: Tensor) -> bool:
    """Whether ``run.compile`` can make one graph of a training step's forward pass."""
    torch._dynamo.reset()
    try:
        torch.compile(model.train(), backend="eager", fullgraph=True, dynamic=False)(images)
    except torch._dynamo.exc.TorchDynamoException:
        return False
    return True


def check(network: Network, folder: Path) -> dict[str, str]:
    """Train, resume, average and export one network; a row of docs/trunks.md.

    Raises:
        AssertionError: The resumed run differs, or an average or an export is not what it should be.
    """
    model, size = build(network), network.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole = train(load(network, folder, "whole", ["max_duration=2ba"]))
    train(load(network, folder, "broken", ["max_duration=1ba"]))
    broken = train(load(network, folder, "broken", ["max_duration=2ba"]))
    expected, found = state(whole), state(broken)
    assert expected.keys() == found.keys() and len(expected) > 10
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []
    kinds = load_each(whole)
    assert kinds.keys() == {"raw", "ema"}
    with torch.no_grad():
        raw, average = (kinds[kind].network(images) for kind in ("raw", "ema"))
    assert not torch.equal(raw, average) and bool(raw.isfinite().all())
    differences = write_folder(load_trained(whole, weights="raw"), folder / "export", formats=["safetensors", "onnx"])
    again = load_trained(folder / "export").network
    with torch.no_grad():
        assert torch.equal(again(images), raw)
    maps = observe_attention(model, images, lambda block: block.map) if has_attention(model) else []
    assert all(torch.allclose(each.sum(-1), torch.ones(()), atol=1e-5) for each in maps)
    blocks = len(model.of_timm.blocks)
    graph = is_one_graph(model, images)
    twice = blocks > 0 and recomputes_alike(model, images)
    return {
        "family": network.family,
        "`model.name`": f"`timm/{network.name}`",
        "px": str(size),
        "MFLOP": f"{forward_flops(model, size) / 1e6:.1f}",
        "ONNX": f"{differences['model.onnx']:.0e}",
        "blocks": str(blocks),
        "layers": str(model.num_layer_groups or "no"),
        "one graph": "yes" if graph else "no",
        "recomputed": "yes" if twice else "no",
        "attention": "yes" if maps else "no",
        "other sizes": "yes" if takes(model, 2 * size) else "no",
    }


def takes(model: Trunk, image_size: int) -> bool:
    """Whether the network takes images of another size than it was built for."""
    try:
        model.require_size(image_size, "size")
    except ValueError:
        return False
    return True


def main() -> None:
    """Write the table of docs/trunks.md."""
    rows = []
    for network in NETWORKS:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            rows.append(check(network, Path(folder)))
        print(" | ".join(rows[-1].values()), flush=True)
    page = ROOT / "docs/trunks.md"
    above, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, below = rest.partition(END)
    page.write_text(above + BEGIN + table(rows) + END + below, encoding="utf-8")


BEGIN, END = "<!-- networks -->\n", "<!-- end -->\n"


def table(rows: list[dict[str, str]]) -> str:
    """In Markdown."""
    lines = [list(rows[0]), ["-"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
