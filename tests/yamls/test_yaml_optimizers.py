"""Which parameters the optimizer of a yaml decays, and by which optimizer, against the code of its paper."""

from dataclasses import replace

import pytest

from tests.conftest import ROOT
from tests.test_optim import ADAMW, names_by_decay, tiny_vit
from vitcomposer import config
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model
from vitcomposer.optim import build_optimizer


@pytest.mark.parametrize(
    ("yaml", "spared"),
    [
        # utils.get_params_groups of facebookresearch/dino: names that end in .bias and one-dimensional parameters.
        ("dino_vit_s", lambda name, p: p.ndim == 1 or name.endswith("bias")),
        # main_moco.py of facebookresearch/moco-v3 gives AdamW all parameters in one group.
        ("moco3_vit_s", lambda name, p: False),
        # timm 0.3.2, with which DeiT was trained, lists cls_token and pos_embed for the distilled model too.
        ("deit_s_distilled", lambda name, p: p.ndim == 1 or name in ("cls_token", "pos_embed")),
        ("deit_s", lambda name, p: p.ndim == 1 or name in ("cls_token", "pos_embed")),
    ],
)
def test_yaml_decays_what_the_code_of_its_paper_decays(yaml, spared):
    cfg = config.load(ROOT / f"yamls/{yaml}.yaml")
    options = {"num_heads": 12, "position_embedding": "sincos"} if yaml == "moco3_vit_s" else {}
    model = build_model(cfg.model.name, num_classes=5, image_size=32, depth=1, **options)
    optimizer = build_optimizer(model, cfg.optimizer, global_train_batch_size=512)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = names_by_decay(model, optimizer.param_groups)
    assert found.get(False, set()) == {name for name, p in learning.items() if spared(name, p)}
    assert found[True] == learning.keys() - found.get(False, set())


def test_names_that_are_not_decayed_must_be_parameters():
    model = tiny_vit()
    with pytest.raises(ConfigError, match=r"no_weight_decay must be names of .*PlainViT, .*'dist_token'.*Drop dist_t"):
        build_optimizer(model, replace(ADAMW, no_weight_decay=["dist_token"]), global_train_batch_size=512)
    with pytest.raises(ConfigError, match=r"optimizer.no_weight_decay must be null with optimizer.decay_all"):
        replace(ADAMW, no_weight_decay=[], decay_all=True)


@pytest.mark.parametrize("yaml", ["deit3_s", "deit3_b", "vit_b_medium"])
def test_lamb_of_deit3_has_the_eps_of_its_code(yaml):
    """main.py of facebookresearch/deit: --opt-eps 1e-8 by default, for fusedlamb too; timm's LAMB has 1e-6."""
    optimizer = config.load(ROOT / f"yamls/{yaml}.yaml").optimizer
    built = build_optimizer(tiny_vit(), optimizer, global_train_batch_size=2048)
    assert {(group["eps"], group["max_grad_norm"]) for group in built.param_groups} == {(1e-8, 1.0)}
