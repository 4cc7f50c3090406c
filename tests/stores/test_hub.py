"""Weights by name from the Hugging Face hub: a cache laid out as huggingface_hub's, and a server that refuses."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils._http import reset_sessions
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from recipes import RECIPES
from tests.conftest import ROOT
from tests.trunks.networks import _RUN, state
from vitcomposer import config
from vitcomposer.errors import ConfigError
from vitcomposer.evaluation.trained import load_trained
from vitcomposer.models import build_model, load_weights
from vitcomposer.stores.hub import check_address, fetch_from_hub, is_on_hub
from vitcomposer.training.fit import fit

PAGE = ROOT / "yamls/finetune_photos.yaml"
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
DINOV2, DINOV3 = "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m"
SIGLIP = "vit_base_patch16_siglip_gap_224.webli"
HASH = "0123456789abcdef0123456789abcdef01234567"


def add(cache: Path, repository: str, files: dict[str, Any]) -> Path:
    """A repository as huggingface_hub has it: ``models--OWNER--NAME``, a reference and a snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / HASH
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(HASH)
    for name, content in files.items():
        if isinstance(content, str):
            (snapshot / name).write_text(content)
        else:
            save_file({key: value.clone().contiguous() for key, value in content.items()}, snapshot / name)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    return tmp_path / "hub"


def network(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    model = timm.create_model(name, **{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def trunk(name: str, **options: Any) -> Any:
    return build_model(f"timm/{name.partition('.')[0]}", **{"num_classes": 5, "image_size": 64, **SMALL, **options})


def test_addresses_are_told_from_paths() -> None:
    assert is_on_hub("timm:resnet18.a1_in1k") and is_on_hub("hf:timm/resnet18.a1_in1k@main")
    assert not is_on_hub("weights/timm.pth") and not is_on_hub(None)
    assert check_address("hf:resnet18") and check_address("timm:a b") and check_address("hf:a/b") is None


def test_weights_of_timm_come_from_the_cache_with_their_licence(cache: Path) -> None:
    theirs = network(DINOV2, img_size=56)
    add(cache, f"timm/{DINOV2}", {"model.safetensors": theirs.state_dict()})
    found = fetch_from_hub(f"timm:{DINOV2}")
    assert found.licence == "apache-2.0" and found.repository == f"timm/{DINOV2} at {HASH[:12]}"
    assert found.input["crop_ratio"] == 1.0 and found.input["interpolation"] == "bicubic"
    ours = trunk(DINOV2, image_size=56).eval()
    report = load_weights(ours, f"timm:{DINOV2}", min_matched=1)
    assert report.matched == 1 and "licence: apache-2.0" in str(report) and report.resized == ()
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), atol=1e-6, rtol=1e-5)


def test_a_repository_says_its_licence_and_its_images_by_itself(cache: Path) -> None:
    page = {
        "architecture": "resnet18",
        "pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop_pct": 0.9},
    }
    front = "---\ntags: [x]\nlicense: cc-by-nc-4.0\n---\n# Weights\n"
    weights = timm.create_model("resnet18").state_dict()
    add(cache, "somebody/trunk", {"model.safetensors": weights, "config.json": json.dumps(page), "README.md": front})
    found = fetch_from_hub("hf:somebody/trunk")
    assert found.licence == "cc-by-nc-4.0"
    assert found.input == {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_ratio": 0.9}
    report = load_weights(build_model("timm/resnet18", num_classes=3, image_size=64), "hf:somebody/trunk")
    assert report.matched == 1 and set(report.replaced_heads) == {"fc.weight", "fc.bias"}
    ours = build_model("resnet18", num_classes=1000, image_size=64)
    load_weights(ours, "hf:somebody/trunk", min_matched=1)
    assert torch.equal(ours.state_dict()["conv1.weight"], weights["conv1.weight"])


def published(name: str) -> dict[str, Tensor]:
    """The tensors of a network as those who trained DINOv3 name them."""
    found = {}
    for key, value in network(name).state_dict().items():
        key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        found[key] = value
    return {**found, "rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, 1, 48)}


def test_positions_and_patches_are_resized_by_timms_rules(cache: Path) -> None:
    """DINOv2 of patches of 14 in images of 518 pixels into patches of 16 in images of 64."""
    theirs = network(DINOV2).state_dict()
    add(cache, f"timm/{DINOV2}", {"model.safetensors": theirs})
    ours = trunk(DINOV2, patch_size=16)
    report = load_weights(ours, f"timm:{DINOV2}", min_matched=1)
    assert set(report.resized) == {"pos_embed", "patch_embed.proj.weight"}
    loaded = ours.state_dict()
    grid = resample_abs_pos_embed(theirs["pos_embed"], new_size=[4, 4], old_size=[37, 37], num_prefix_tokens=0)
    torch.testing.assert_close(loaded["pos_embed"], grid)
    patches = resample_patch_embed(theirs["patch_embed.proj.weight"], [16, 16])
    torch.testing.assert_close(loaded["patch_embed.proj.weight"], patches)
    # FlexiViT's rule: a resized patch of a smooth image gives nearly the token of the patch.
    assert torch.equal(loaded["blocks.1.mlp.fc1.weight"], theirs["blocks.1.mlp.fc1.weight"])


def test_rotations_are_made_for_the_size_of_the_images(cache: Path) -> None:
    """DINOv3's own names and periods, which are no weights; the same network answers alike in another size."""
    add(cache, f"timm/{DINOV3}", {"model.safetensors": published(DINOV3)})
    ours = trunk(DINOV3).eval()
    report = load_weights(ours, f"timm:{DINOV3}", min_matched=1)
    assert report.matched == 1 and report.resized == ()
    theirs = network(DINOV3, img_size=64, dynamic_img_size=True)
    for size in (64, 96):
        images = torch.randn(1, 3, size, size)
        torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), atol=1e-5, rtol=1e-4)


def test_another_network_is_refused_in_a_line(cache: Path) -> None:
    add(cache, f"timm/{DINOV2}", {"model.safetensors": network(DINOV2, depth=3).state_dict()})
    with pytest.raises(ValueError, match=r"is of another architecture: the model has no blocks\.2"):
        load_weights(trunk(DINOV2, image_size=56), f"timm:{DINOV2}")
    with pytest.raises(ValueError, match=r"fills .* of the model, at least 90.0% is required|of another architecture"):
        load_weights(trunk(DINOV2, depth=4, image_size=56), f"timm:{DINOV2}")
    with pytest.raises(ValueError, match="must be weights that timm .* knows, got 'timm:vit_small_patch14_dinov3'"):
        fetch_from_hub("timm:vit_small_patch14_dinov3")


def test_what_is_not_in_the_cache_says_how_it_gets_there(cache: Path) -> None:
    with pytest.raises(
        ValueError, match=r"while HF_HUB_OFFLINE is set, it is not. Run `hf download timm/resnet18.a1_in1k`"
    ):
        fetch_from_hub("timm:resnet18.a1_in1k")


class _Refusal(BaseHTTPRequestHandler):
    """Answers as the hub does: 403 with a code for a gated repository, 401 for one that is not there."""

    def do_HEAD(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def refusing_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    reset_sessions()  # one that was made offline stays so
    yield url
    server.shutdown()
    server.server_close()


def test_gated_and_missing_repositories_name_the_remedy(refusing_hub: str) -> None:
    with pytest.raises(ValueError) as gated:
        fetch_from_hub("hf:owner/gated")
    assert f"is gated: accept its terms at {refusing_hub}/owner/gated and set HF_TOKEN" in str(gated.value)
    assert "\n" not in str(gated.value) and "Apache-2.0" in str(gated.value)
    with pytest.raises(ValueError, match=r"there is no owner/missing. Mend the name, or set HF_TOKEN"):
        fetch_from_hub("hf:owner/missing")


def settings(cache: Path, *more: str) -> list[str]:
    small = [f"model.{key}={value}" for key, value in SMALL.items()]
    page = [f"model.name=timm/{SIGLIP.partition('.')[0]}", "model.image_size=64", "model.num_classes=5", *small, *_RUN]
    return [*page, f"init.weights=timm:{SIGLIP}", f"run.folder={cache.parent}", "run.name=run", *more]


def test_a_run_takes_its_images_from_the_weights_and_says_so(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation and a later start have them too, where the weights are gone."""
    snapshot = add(cache, f"timm/{SIGLIP}", {"model.safetensors": network(SIGLIP).state_dict()})
    cfg = config.load(PAGE, settings(cache, "max_duration=1ba"))
    assert cfg.init.follow == ["mean", "std"] and cfg.augment.mean != (0.5, 0.5, 0.5)
    trainer = RECIPES["supervised"].build(cfg)
    assert fit(trainer, cfg) == 0
    trainer.close()
    said = capsys.readouterr().out
    line = (
        f"timm:{SIGLIP}: of the weights: mean [0.5, 0.5, 0.5]; std [0.5, 0.5, 0.5]; the yaml's crop_ratio 1.0, not 0.9"
    )
    assert f"{line}\n" in said and "licence: apache-2.0" in said
    run = cache.parent / "run"
    recorded = config.load(run / "config.yaml")
    assert recorded.augment.mean == recorded.augment.std == (0.5, 0.5, 0.5) and recorded.init.follow == []
    assert load_trained(run).mean == (0.5, 0.5, 0.5)
    for file in snapshot.iterdir():
        file.unlink()
    cfg = config.load(PAGE, settings(cache, "max_duration=2ba"))
    trainer = RECIPES["supervised"].build(cfg)
    assert fit(trainer, cfg) == 0
    trainer.close()
    assert config.load(run / "config.yaml").augment.mean == (0.5, 0.5, 0.5) and len(state(run)) > 10


def test_the_yaml_decides_where_it_says_something(cache: Path) -> None:
    given = ["augment.mean=[0.1, 0.2, 0.3]", "init.follow=[std, crop_ratio]"]
    from vitcomposer.models.weights.published import follow_weights

    add(cache, f"timm/{SIGLIP}", {"model.safetensors": network(SIGLIP).state_dict()})
    assert config.load(PAGE, settings(cache, given[0])).init.follow == ["std"]
    cfg, line = follow_weights(config.load(PAGE, settings(cache, *given)))
    assert (
        cfg.augment.mean == (0.1, 0.2, 0.3) and cfg.augment.std == (0.5, 0.5, 0.5) and cfg.evaluation.crop_ratio == 0.9
    )
    assert line is not None and "the yaml's mean [0.1, 0.2, 0.3], not [0.5, 0.5, 0.5]" in line


def test_a_start_without_the_weights_is_one_line(cache: Path) -> None:
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set") as error:
        RECIPES["supervised"].build(config.load(PAGE, settings(cache)))
    assert "\n" not in str(error.value)
