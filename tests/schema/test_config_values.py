"""What a value means: text keeps its letters, null and {} empty mappings, every bad value of every field is refused."""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tests.conftest import ROOT
from vitcomposer import config
from vitcomposer.config.values import block_of
from vitcomposer.errors import ConfigError
from vitcomposer.schema import CONFIGS

DEIT = ROOT / "yamls/deit_s.yaml"
PAGES = {
    "supervised": DEIT,
    "distill": ROOT / "yamls/deit_s_distilled_cached.yaml",
    "swav": ROOT / "yamls/swav_demo.yaml",
    "simclr": ROOT / "yamls/simclr_vit_b.yaml",
    "moco": ROOT / "yamls/moco3_vit_s.yaml",
    "dino": ROOT / "yamls/dino_vit_s.yaml",
    "probe": ROOT / "yamls/probe_linear.yaml",
    "knn": ROOT / "yamls/probe_knn.yaml",
}
TEXTS = ("010", "20241102_123045", "1e5", "1_000", "no", "yes", "on", "off", "true", "12:30", "12:30:45", "2024-11-02")
TEXTS += ("0x10", "0o17", "1.0", "+3", ".5", ".inf", "nan", "a#b", "a #b", "10%", "ä")


def problems(page: Path, *overrides: str) -> list[str]:
    try:
        config.load(page, overrides)
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("text", TEXTS)
def test_text_keeps_its_letters_from_command_line_file_and_saved_form(text: str, tmp_path: Path) -> None:
    named = config.load(DEIT, [f"run.name={text}", f"data.train_split={text}", f"run.folder='{text}'"])
    assert (named.run.name, named.data.train_split, named.run.folder) == (text, text, text)
    page = tmp_path / "page.yaml"
    page.write_text(DEIT.read_text().replace("\ndata:\n", f"\ndata:\n  val_split: {text}\n"))
    assert config.load(page).data.val_split == text.partition(" #")[0]  # a file has comments
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(named))
    assert config.load(saved) == named


def test_text_in_lists_and_mappings_keeps_its_letters() -> None:
    cfg = config.load(ROOT / "yamls/probe_linear.yaml", ["heads.features=[010, no, 1e5]"])
    assert cfg.heads.features == ["010", "no", "1e5"]
    cfg = config.load(DEIT, ["optimizer.options={a: '010', b: 010, c: 1e-3, d: yes, e: [0.9, 12:30], f: null}"])
    assert cfg.optimizer.options == {"a": "010", "b": 10, "c": 1e-3, "d": True, "e": [0.9, "12:30"], "f": None}


def test_a_number_keeps_its_type() -> None:
    cfg = config.load(DEIT, ["optimizer.lr=1e-3", "model.drop_path_rate=0", "global_train_batch_size=512"])
    assert (cfg.optimizer.lr, cfg.model.drop_path_rate, cfg.global_train_batch_size) == (1e-3, 0.0, 512)
    assert config.load(DEIT, ["run.device_train_microbatch_size=8"]).run.device_train_microbatch_size == 8
    assert config.load(PAGES["swav"], ["sync_bn=8"]).sync_bn == 8
    assert config.load(PAGES["swav"], ["sync_bn=node"]).sync_bn == "node"
    for word, value in (("yes", True), ("off", False), ("TRUE", True)):
        assert config.load(DEIT, [f"run.compile={word}"]).run.compile is value


def test_empty_mapping_empties_and_null_removes_an_entry() -> None:
    both = ["algorithms.SAM={rho: 0.1}", "algorithms.EMA.smoothing=0.5"]
    assert config.load(DEIT, both).algorithms.keys() == {"EMA", "SAM"}
    assert config.load(DEIT, [*both, "algorithms={}"]).algorithms == {}
    assert config.load(DEIT, ["algorithms=null"]).algorithms == {}
    assert config.load(DEIT, [*both, "algorithms.EMA=null"]).algorithms == {"SAM": {"rho": 0.1}}
    assert config.load(DEIT, [*both, "algorithms={EMA: null}"]).algorithms == {"SAM": {"rho": 0.1}}
    assert config.load(DEIT, [*both, "algorithms.SAM.rho=null"]).algorithms["SAM"] == {}
    page = PAGES["probe"]
    assert config.load(page).optimizer.options == {"momentum": 0.9}
    assert config.load(page, ["optimizer.options.momentum=null"]).optimizer.options == {}
    assert config.load(page, ["optimizer.options={}"]).optimizer.options == {}
    assert config.load(page, ["optimizer.options.nesterov=null"]).optimizer.options["nesterov"] is None
    assert config.load(PAGES["swav"], ["monitor=null"]).monitor is None
    (problem,) = problems(DEIT, "algorithms.Ema=null")
    assert "algorithms.Ema must be an entry that can be removed" in problem and "Did you mean 'EMA'?" in problem
    assert problems(DEIT, "model={}")[0].startswith("model.name is required and missing")


ONE_LINE = {
    "run.name=@x": "run.name must be a value that yaml can read, got '@x'",
    "run.name=%j": "run.name must be a value that yaml can read, got '%j'",
    "run.name=`x`": "run.name must be a value that yaml can read",
    "run.name=${HOME}": "run.name must refer to a key of this yaml",
    "run.name=${HOME": "run.name must hold references that are whole",
    "data.local=${DATA}/x": "data.local must refer to a key of this yaml",
    "augment.crop_scale[0]=0.5": "Write augment.crop_scale=[..., ...].",
    "augment.crop_scale.0=0.5": "Write augment.crop_scale=[..., ...].",
    "augment.crop_scale.low=0.5": "Write augment.crop_scale=[..., ...].",
    "model.name=[}": "model.name must be a value that yaml can read",
    "model.name='x": "model.name must be a value that yaml can read",
    'model.name="x': "model.name must be a value that yaml can read",
    "model.name={a: [1}": "model.name must be a value that yaml can read",
    "optimizer.options={a: 1, a: 2}": "a stands there for the second time",
    "run.name=!!python/object:os.system x": "is no kind of value here",
    "run.name=[1, 2]": "run.name must be a text, got [1, 2]",
    "run.name={a: 1}": "run.name must be a text, got {'a': 1}",
    "run.name=": "run.name must be a text, got null",
    "run.name=null": "run.name must be a text, got null",
    "run=3": "run must be a block of keys and values, got 3",
    "algorithms=[EMA]": "algorithms must be keys and values, got ['EMA']",
    "algorithms.EMA=1": "algorithms.EMA must be keys and values, got 1",
    "run.loggers=wandb": "run.loggers must be a list, got 'wandb'",
    "model..name=x": "model..name must be names joined by dots",
    "=x": "must be of the form key=value",
    "x": "must be of the form key=value",
    "optimizer.lr=1,5": "optimizer.lr must be a finite number, got '1,5'",
    "optimizer.lr=nan": "optimizer.lr must be a finite number",
    "optimizer.options.eps=.inf": "optimizer.options.eps must be a finite number",
    "seed=4294967296": "seed must be at most",
    "seed=-1": "seed must be 0 or more",
    "seed=1e3": "seed must be a whole number, got 1000.0",
    "model.num_classes=1": "model.num_classes must be 2 or more, got 1",
    "evaluation.image_size=-5": "evaluation.image_size must be 1 or more, got -5",
    "evaluation.image_size=0": "evaluation.image_size must be 1 or more, got 0",
}
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "must hold keys and values, it is empty"),
    "comment": (b"# nothing\n", "must hold keys and values, it is empty"),
    "list": (b"- recipe\n- b\n", "must hold keys and values, got a list"),
    "text": (b"hello\n", "must hold keys and values, got a text"),
    "latin1": ("recipe: supervised\nrun: {name: größe}\n".encode("latin-1"), "must be text in UTF-8, line 2 is not"),
    "utf16": ("recipe: supervised\n".encode("utf-16"), "must be text in UTF-8, it is in UTF-16"),
    "tabs": (b"recipe: supervised\nmodel:\n\tname: x\n", "line 3, column 1"),
    "twice": (b"recipe: supervised\nseed: 1\nseed: 2\n", "in line 3 seed stands there for the second time"),
    "bracket": (b"recipe: supervised\nmodel: {name: x\n", "must be readable yaml"),
    "control": (b"recipe: supervised\nrun: {name: a\x07}\n", "must be readable yaml"),
    "object": (b"recipe: !!python/object/apply:os.system [ls]\n", "line 1 !!python/object/apply:os.system"),
    "endless": (b"recipe: &a [*a]\n", "20 levels"),
    "laughs": (
        b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 10)) for i in range(6)),
        "100,000 values",
    ),
    "deep": (b"recipe: " + b"[" * 5000, "nested too deeply"),
    "two": (b"recipe: supervised\n---\nrecipe: swav\n", "must be readable yaml"),
    "no recipe": (b"model: {name: x}\n", "recipe must be one of"),
}


def test_what_cannot_be_read_is_one_line_before_composer_is_imported(tmp_path: Path) -> None:
    """In one other process, since this one has imported Composer."""
    program = (
        "import contextlib, io, sys, train\n"
        "for text in sys.stdin.read().split('\\0'):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said):\n"
        "        status = train.main(text.split('\\1'))\n"
        "    print(status, repr(said.getvalue()))\n"
        "print('composer' in sys.modules or 'torch' in sys.modules)\n"
    )
    for name, (content, _) in FILES.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
    starts = [[str(DEIT), "data.source=synthetic", override] for override in ONE_LINE]
    starts += [[str(tmp_path / f"{name}.yaml")] for name in FILES]
    starts += [[str(tmp_path)], [str(tmp_path / "nowhere.yaml")]]
    words = [*ONE_LINE.values(), *(said for _, said in FILES.values()), "it is a folder", "There is no yaml at"]
    given = "\0".join("\1".join(argv) for argv in starts)
    ran = subprocess.run(
        [sys.executable, "-c", program], input=given, capture_output=True, text=True, check=True, cwd=ROOT, timeout=100
    )
    *lines, imported = ran.stdout.splitlines()
    assert imported == "False" and len(lines) == len(starts)
    for line, argv, said in zip(lines, starts, words, strict=True):
        status, text = line.split(" ", 1)
        assert status == "2" and said in ast.literal_eval(text) and text.count("\\n") == 1, (argv, line)
        assert "error: " in text and "Traceback" not in text
        for inner in ("TupleConfig", "AnyNode", "DictConfig", "ListConfig", "Omega", "grammar", "<document"):
            assert inner not in text, (argv, line)


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    page = tmp_path / "deit_s.yaml"
    page.write_bytes(b"\xef\xbb\xbf" + DEIT.read_bytes())
    assert config.load(page) == config.load(DEIT)


def test_all_errors_are_reported_at_once() -> None:
    given = ["optimzer.lr=1e-3", "model.num_classes=1", "max_duration=3", "algorithms.Ema={}", "seed=-1"]
    given += ["data.num_workers=-2", "optimizer.weight_decay=much", "run.name=@x", "mixing.mode=x", "init.weigths=a.pt"]
    with pytest.raises(ConfigError) as error:
        config.load(DEIT, given)
    first, *lines = str(error.value).splitlines()
    assert first == "10 keys cannot be used" and len(lines) == 10
    found = {line.split()[0]: line for line in lines}
    assert found.keys() == {each.split("=")[0] for each in given}
    assert all(line.startswith("  ") and not line.startswith("   ") for line in lines)
    assert found["optimzer.lr"].endswith("is no key of this recipe. Did you mean optimizer.lr?")
    assert found["init.weigths"].endswith("Did you mean init.weights?")
    assert "Did you mean 'EMA'?" in found["algorithms.Ema"]


def test_one_error_stays_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        config.load(DEIT, ["optimzer.lr=1e-3"])
    assert str(error.value) == "optimzer.lr is no key of this recipe. Did you mean optimizer.lr?"


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("config.OPTIMIZER.num_epochs=100", "max_duration=300ep"),
        ("OPTIMIZER.num_epochs=100", "max_duration=300ep"),
        ("+config.SEED_VALUE=1", "Use seed."),
        ("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=64", "Use global_train_batch_size"),
        ("config.OPTIMIZER.weight_decay=0.1", "Use optimizer.weight_decay."),
        ("config.LOSS.swav_loss.queue.queue_length=0", "Use loss.queue_length."),
        ("config.MODEL.SYNC_BN_CONFIG.GROUP_SIZE=8", "Use sync_bn."),
        ("--epochs=100", "max_duration=300ep"),
        ("--batch-size=64", "Use global_train_batch_size"),
        ("--lr=1e-3", "Use optimizer.lr."),
        ("--drop-path=0.1", "Use model.drop_path_rate."),
        ("--warmup-epochs=5", "schedule.t_warmup=5ep"),
        ("batch_size=64", "Use global_train_batch_size"),
        ("lr=1e-3", "Use optimizer.lr."),
        ("weights=x", "Did you mean init.weights"),
        ("model.drop_path=0.1", "Did you mean model.drop_path_rate"),
        ("optimizer.momentum=0.9", "Use optimizer.options.momentum."),
    ],
)
def test_names_of_vissl_deit_and_timm_are_told_in_ours(given: str, ours: str) -> None:
    (problem,) = problems(DEIT, given)
    assert ours in problem


def test_value_of_a_foreign_argument_is_no_error_of_its_own() -> None:
    (problem,) = problems(DEIT, "--epochs", "100", "max_duration=30ep")
    assert "max_duration=300ep" in problem


def test_every_name_that_is_suggested_is_a_key() -> None:
    from vitcomposer.config import foreign_names
    from vitcomposer.config.values import _all_keys

    keys = {key for recipe in CONFIGS.values() for key in _all_keys(recipe)}
    for ours in {**foreign_names._VISSL, **foreign_names._ARGUMENTS}.values():
        name = ours.split(",")[0].split(" ")[0].split("=")[0].split(":")[0]
        known = name in keys or name.rpartition(".")[0] in {*keys, "algorithms"} or name.split(".")[0] == "algorithms"
        assert known or name in ("composer", "vitcomposer", "nothing"), ours


# Every field of every recipe


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(cls):
        hint = get_type_hints(cls)[field.name]
        block = block_of(hint)
        if block is None:
            yield f"{prefix}{field.name}", hint
        else:
            yield from leaves(block, f"{prefix}{field.name}.")


def numbers_in(hint: Any) -> set[type]:
    return {hint} & {int, float} | {kind for arg in get_args(hint) for kind in numbers_in(arg)}


def value_at(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = None if cfg is None else getattr(cfg, name)
    return cfg


def written(old: Any, bad: str) -> str:
    """``bad``, as the last entry of the last list where ``old`` is one."""
    if isinstance(old, list | tuple):
        return f"[{', '.join([*map(str, old[:-1]), written(old[-1], bad)])}]"
    return bad


def numeric_keys(recipe: str) -> list[str]:
    return [key for key, hint in leaves(CONFIGS[recipe]) if numbers_in(hint) and "Any" not in str(hint)]


NEGATIVE = {"sync_bn", "augment.mean", "crops.mean", "teacher.mean", "mean"}  # VISSL's node; colours below the middle
ZERO = NEGATIVE | {
    *(
        "seed",
        "logit_adjustment",
        "model.drop_rate",
        "model.drop_path_rate",
        "model.attn_drop_rate",
        "model.init_values",
    ),
    *("model.local_up_to_layer", "init.min_matched", "init.train_blocks", "data.num_workers", "data.download_retry"),
    *("data.max_bad_fraction", "augment.flip_prob", "augment.color_jitter", "augment.random_erasing"),
    *("mixing.mixup_alpha", "mixing.cutmix_alpha", "mixing.prob", "mixing.switch_prob", "mixing.label_smoothing"),
    *("optimizer.weight_decay", "schedule.alpha_i", "schedule.alpha_f", "run.activation_checkpointing"),
    *("run.skip_nonfinite_steps", "crops.flip_prob", "crops.jitter_prob", "crops.gray_prob", "crops.color_jitter"),
    *("crops.blur_prob", "crops.solarize_prob", "loss.freeze_prototypes_epochs", "loss.hard_assignment_epochs"),
    *("loss.queue_length", "loss.queue_start_epoch", "loss.momentum", "loss.center_momentum"),
    *("loss.teacher_temperature_warmup_epochs", "loss.freeze_last_layer_epochs", "loss.weight_decay_end"),
}
MUST_BE_ZERO = "model.num_classes"  # of a trunk


@pytest.mark.parametrize("recipe", CONFIGS)
def test_no_field_takes_a_number_that_no_run_has(recipe: str) -> None:
    page, keys = PAGES[recipe], numeric_keys(recipe)
    monitor = ["monitor={k: [20], temperature: 0.07}"] if "monitor.k" in keys else []
    cfg = config.load(page, monitor)
    floats = {key for key, hint in leaves(CONFIGS[recipe]) if float in numbers_in(hint)}
    assert len(keys) > 15
    for bad in ("-1", "0", "1" + 30 * "0", "1e30", "nan", "inf", "-inf", "1e400"):
        allowed = {"-1": NEGATIVE, "0": ZERO | ({MUST_BE_ZERO} if cfg.model.num_classes == 0 else set())}
        given = [key for key in keys if key not in allowed.get(bad, set()) and (bad != "1e30" or key in floats)]
        found = problems(page, *monitor, *(f"{key}={written(value_at(cfg, key), bad)}" for key in given))
        # All at once: that each is named shows that none hides another.
        for key in given:
            assert any(problem.startswith(key) for problem in found), f"{key}={bad} was taken"


TIMES = ("max_duration", "schedule.t_warmup", "run.eval_interval", "run.save_interval", "run.log_interval")
TIMES += ("run.attention_interval", "monitor.interval", "knn.interval")


@pytest.mark.parametrize("recipe", CONFIGS)
def test_no_field_takes_a_time_that_never_comes(recipe: str) -> None:
    keys = {key for key, _ in leaves(CONFIGS[recipe])} & set(TIMES)
    named = {key for key, _ in leaves(CONFIGS[recipe]) if key.endswith(("interval", "duration", "t_warmup"))}
    assert keys == named, "a new time string belongs to TIMES"
    for key in keys:
        for bad in ("foo", "-1ba", "0ep", "1.5ep", "5", "1tok", "ep", "1e400ba", "nanep", "1 ep x"):
            if (key, bad) == ("schedule.t_warmup", "0ep"):
                continue
            found = problems(PAGES[recipe], f"{key}={bad}")
            assert found and all(problem.startswith(key) for problem in found), f"{key}={bad}: {found}"
    for key in keys - {"max_duration", "run.attention_interval"}:
        assert not problems(PAGES[recipe], f"{key}=0.05dur")


@pytest.mark.parametrize(
    "bad",
    [
        "algorithms.EMA.smoothing=1",
        "algorithms.EMA.smoothing=abc",
        "algorithms.EMA.smoothing=true",
        "algorithms.EMA.update_interval=foo",
        "algorithms.EMA.update_interval=0ba",
        "algorithms.EMA.ema_start=-1ba",
        "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: -1}",
        "algorithms.GradientClipping={clipping_type: norm}",
        "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: .nan}",
        "algorithms.SAM={interval: 0}",
        "algorithms.SAM={interval: 1.5}",
        "algorithms.CutOut={num_holes: 0}",
        "algorithms.SAM={rho: -1}",
        "algorithms.MixUp={}",
        "optimizer.options.momentum=nan",
    ],
)
def test_arguments_of_algorithms_are_looked_at_before_composer_is_there(bad: str) -> None:
    key = bad.split("=")[0].removesuffix("={")
    (problem,) = problems(DEIT, bad)
    assert problem.startswith(key)
