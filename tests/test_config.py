"""From a yaml and overrides to a frozen dataclass, and the one clear error of each wrong key."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vitcomposer import config
from vitcomposer.errors import ConfigError
from vitcomposer.schema import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
DEIT = ROOT / "yamls/deit_s.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "yamls").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_yaml_loads_and_its_saved_form_is_equal(path: Path, tmp_path: Path) -> None:
    cfg = config.load(path)
    assert isinstance(cfg, CONFIGS[cfg.recipe])
    assert cfg.run.name == path.stem
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(cfg))
    assert config.load(saved) == cfg


def test_overrides_change_nested_values_with_their_types() -> None:
    cfg = config.load(
        DEIT, ["max_duration=100ep", "optimizer.lr=1e-3", "model.drop_path_rate=0", "data.remote=s3://b/x"]
    )
    assert cfg.max_duration == "100ep"
    assert cfg.optimizer.lr == 1e-3
    assert cfg.model.drop_path_rate == 0.0
    assert cfg.data.remote == "s3://b/x"


def test_configuration_is_frozen() -> None:
    cfg = config.load(DEIT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.model.num_classes = 10


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 2e-3), ("sqrt", 1e-3), ("none", 5e-4)])
def test_peak_lr_follows_the_global_batch(scaling: str, peak: float) -> None:
    cfg = config.load(DEIT, ["global_train_batch_size=2048", f"optimizer.lr_scaling={scaling}"])
    assert cfg.optimizer.peak_lr(cfg.global_train_batch_size) == pytest.approx(peak)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.drop_path=0.1", ["model.drop_path", "Did you mean", "drop_path_rate"]),
        ("optimizer.lr=fast", ["optimizer.lr must be a finite number, got 'fast'"]),
        ("optimizer.lr=-1", ["optimizer.lr", "above 0", "-1"]),
        ("augment.crop_scale=[0.5]", ["augment.crop_scale must be a list of 2 values, got [0.5]"]),
        ("augment.crop_scale=[0.9,0.1]", ["augment.crop_scale", "low <= high", "0.9"]),
        ("augment.three_augment=true", ["augment.three_augment", "augment.rand_augment", "Choose one"]),
        ("recipe=superviced", ["recipe", "superviced", "Did you mean", "supervised"]),
        ("precision=bf16", ["precision", "bf16", "amp_bf16", "auto"]),
        ("mixing.label_smoothing=1.5", ["mixing.label_smoothing", "[0, 1)", "1.5"]),
        ("global_train_batch_size=12.5", ["global_train_batch_size", "a whole number", "12.5"]),
        ("global_train_batch_size=0", ["global_train_batch_size", "1 or more", "0"]),
        ("data.local=null", ["data.local", "data.source=synthetic"]),
        ("run.loggers=[wandbb]", ["run.loggers", "wandbb", "wandb"]),
        ("max_duration", ["key=value", "max_duration"]),
        ("--epochs=3", ["key=value", "--epochs"]),
    ],
)
def test_wrong_override_names_key_rule_and_value(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(DEIT, [override])
    for word in words:
        assert word in str(caught.value)


def test_missing_key_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    page.write_text(DEIT.read_text().replace("  weight_decay: 0.05\n", ""))
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay is required and missing"):
        config.load(page)


def test_missing_yaml_suggests_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .*yamls/deit_s\.yaml"):
        config.load(ROOT / "yamls/deit_s1.yaml")


def test_a_name_is_the_yaml_of_ours_and_a_file_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deit_b").mkdir()
    assert config.load("deit_s") == config.load(DEIT)
    assert config.load("deit_b").run.name == "deit_b"
    Path("deit_s").write_text(DEIT.read_text().replace("weight_decay: 0.05", "weight_decay: 0.06"))
    assert config.load("deit_s").optimizer.weight_decay == 0.06
    with pytest.raises(ConfigError, match=r"There is no yaml at deit_s1\. Did you mean 'deit_s'\?"):
        config.load("deit_s1")
    for path in ("deit_ti.yaml", "x/deit_ti"):
        with pytest.raises(ConfigError, match=f"There is no yaml at {path}"):
            config.load(path)


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    page.write_text("recipe: supervised\nmodel: {name: deit_small_patch16\n")
    with pytest.raises(ConfigError, match=r"page\.yaml.*line"):
        config.load(page)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("AWS_SECRET_ACCESS_KEY", "${oc.env:AWS_SECRET_ACCESS_KEY}"),
        ("AWS_SECRET_ACCESS_KEY", '${oc.env:"AWS_SECRET_ACCESS_KEY"}'),
        ("AWS_SECRET_ACCESS_KEY", "${oc.env:'AWS_SECRET_ACCESS_KEY'}"),
        ("AWS_SECRET_ACCESS_KEY", "s3://${ oc.env:AWS_SECRET_ACCESS_KEY , none}/host"),
        ("AWS_SECRET_ACCESS_KEY", "${oc.env:${run.name}}"),
        ("AWS_SECRET_ACCESS_KEY", "${oc.decode:'${oc.env:AWS_SECRET_ACCESS_KEY}'}"),
        ("AWS_SECRET_ACCESS_KEY", "${oc.select:nowhere,${oc.env:AWS_SECRET_ACCESS_KEY}}"),
        ("DATABASE_URL", "${oc.env:DATABASE_URL}"),
        ("SLURM_JWT", "${oc.env:SLURM_JWT}"),
        ("MY_PASSWD", "${oc.env:MY_PASSWD}"),
        ("GITHUB_PAT", "${oc.env:GITHUB_PAT}"),
        ("HARMLESS", "${oc.env:HARMLESS}"),
    ],
)
def test_no_reference_reads_the_environment_outside_the_list(
    name: str, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "canary-of-the-test")
    given = ["data.local=/cache", "run.name=AWS_SECRET_ACCESS_KEY", f"data.remote={reference}"]
    with pytest.raises(ConfigError, match=f"(?s)data.remote.*must not read the environment variable {name}") as error:
        config.load(DEIT, given)
    assert "canary" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_place_of_a_job_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    cfg = config.load(DEIT, ["data.local=${oc.env:DATA}/imagenet", "run.name=deit_${oc.env:SLURM_JOB_ID}"])
    assert (cfg.data.local, cfg.run.name) == ("/data/imagenet", "deit_4711")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", "0123456789abcdef"),
        ("DB", "postgres://user:password@host/db"),
        ("X", "github_pat_" + 22 * "a"),
    ],
)
def test_a_credential_that_the_shell_wrote_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=f"data.local must not hold the value of the environment variable {name}"
    ) as e:
        config.load(DEIT, [f"data.local=/data/{value}/x"])
    assert value not in str(e.value)


def test_resolvers_of_a_caller_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMLESS", "7")
    config.load(DEIT)
    assert OmegaConf.create({"a": "${oc.env:HARMLESS}"}).a == "7"
