"""The design's rules that a reader could break without noticing: layers, sizes, headers, and what README names."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from vitcomposer import config

ROOT = Path(__file__).resolve().parent.parent
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
SOURCES = [*ROOT.glob("vitcomposer/**/*.py"), *ROOT.glob("recipes/*.py"), ROOT / "train.py"]

LAYERS = {
    "vitcomposer": 0,
    "vitcomposer.schema": 0,
    "vitcomposer.config": 0,
    "vitcomposer.folder_lock": 0,
    "vitcomposer.whole_files": 0,
    "vitcomposer.ranks": 0,
    "vitcomposer.escape": 0,
    "vitcomposer.averages": 0,
    "vitcomposer.run_metrics": 0,
    "vitcomposer.models": 1,
    "vitcomposer.losses": 1,
    "vitcomposer.data": 2,
    "vitcomposer.optim": 2,
    "vitcomposer.flops": 2,
    "vitcomposer.curriculum": 2,
    "vitcomposer.knn": 2,
    "vitcomposer.checkpoint_folder": 2,
    "vitcomposer.checkpoint_loading": 3,
    "vitcomposer.costs": 3,
    "vitcomposer.execution": 3,
    "vitcomposer.run_folder": 3,
    "vitcomposer.failures": 4,
    "vitcomposer.tasks": 3,
    "vitcomposer.algorithms": 3,
    "vitcomposer.callbacks": 3,
    "vitcomposer.trainer": 4,
    "vitcomposer.report": 4,
    "vitcomposer.bench": 4,
    "vitcomposer.plan": 4,
    "vitcomposer.trained": 4,
    "vitcomposer.attention_pictures": 4,
    "vitcomposer.attention": 5,
    "vitcomposer.teacher_writer": 4,
    "vitcomposer.cache_teacher": 5,
    "vitcomposer.confusion": 4,
    "vitcomposer.scores": 5,
    "vitcomposer.export_card": 4,
    "vitcomposer.export_graph": 4,
    "vitcomposer.export_timm": 4,
    "vitcomposer.export": 5,
    "vitcomposer.soup": 6,
    "vitcomposer.evaluate": 6,
    "vitcomposer.predict": 7,
    "vitcomposer.pretraining": 5,
    "vitcomposer.supervision": 5,
    "vitcomposer.measurement": 5,
    "vitcomposer.launch_commands": 4,
    "vitcomposer.launch_kubernetes": 5,
    "vitcomposer.launch": 6,
    "vitcomposer.convert": 3,
    "vitcomposer.cli": 8,
    "vitcomposer.__main__": 9,
    "recipes": 10,
    "train": 11,
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int:
    while module not in LAYERS:
        module, dot, _ = module.rpartition(".")
        assert dot, "every module of ours belongs to a layer"
    return LAYERS[module]


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if is_module(name) else node.module for name in names}
    return {name for name in found if name.split(".")[0] in ("vitcomposer", "recipes", "train")}


def unit(module: str) -> str:
    """A file or a folder directly below the package: its own files may import each other."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_only_downwards(path: Path) -> None:
    own = module_name(path)
    for other in imports(path):
        if unit(own) == unit(other) or (own == "recipes" and unit(other).startswith("recipes.")):
            continue
        assert not (own.startswith("recipes.") and other.startswith("recipes.")), "a recipe never imports another"
        below = layer(other) < layer(own) or (unit(other) == "vitcomposer.schema" and layer(own) == 0)
        assert below, f"{own} imports {other}, which is not below it"


def test_models_and_losses_never_import_composer() -> None:
    for path in [*ROOT.glob("vitcomposer/models/*.py"), *ROOT.glob("vitcomposer/losses/*.py")]:
        assert not re.search(r"^\s*(from|import) (composer|streaming)\b", path.read_text(), re.M), path


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_file_is_under_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_train_is_under_60_lines() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_yaml_header_is_complete(path: Path) -> None:
    header = [line for line in path.read_text().splitlines()[:12] if line.startswith("#")]
    text = "\n".join(header)
    for word in ("Expected top-1:", "Measured top-1:", "Cost:", f"train.py yamls/{path.name}"):
        assert word in text
    assert re.search(r"arXiv:\d{4}\.\d{5}|scikit-learn", header[0])


def differing_keys(names: tuple[str, ...]) -> set[str]:
    import dataclasses

    def flat(value: object, prefix: str = "") -> dict[str, object]:
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
        return {prefix.rstrip("."): value}

    pages = [flat(dataclasses.asdict(config.load(ROOT / f"yamls/{name}.yaml"))) for name in names]
    keys = set().union(*pages)
    return {key for key in keys if len({repr(page.get(key)) for page in pages}) > 1} - {"run.name"}


DISTILLATION = {
    *(f"teacher.{key}" for key in ("name", "weights", "mean", "std")),
    *(f"distillation.{key}" for key in ("kind", "alpha", "temperature", "kl", "teacher_sees")),
}


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("deit_ti", "deit_s", "deit_b"), {"model.name"}),
        (("deit_ti_distilled", "deit_s_distilled", "deit_b_distilled"), {"model.name"}),
        (("deit_s", "deit_s_distilled"), DISTILLATION | {"recipe", "model.name", "optimizer.no_weight_decay"}),
        (("convit_ti", "convit_s", "convit_b"), {"model.name"}),
        (("vit_s_medium", "vit_s_hot"), {"max_duration", "model.drop_path_rate"}),
        (("vit_s", "vit_b", "vit_l"), {"model.name", "augment.rand_augment", "mixing.mixup_alpha"}),
        (
            ("deit3_s", "deit3_b"),
            {
                "model.name",
                "model.image_size",
                "model.drop_path_rate",
                "optimizer.lr",
                "schedule.alpha_i",
                "schedule.alpha_f",
            },
        ),
    ],
)
def test_family_differs_only_in(names: tuple[str, ...], keys: set[str]) -> None:
    assert differing_keys(names) == keys


def test_every_schema_field_is_set_by_a_yaml_or_is_mechanics() -> None:
    import dataclasses

    from vitcomposer import schema

    text = "\n".join(path.read_text() for path in YAMLS)
    for block in (schema.Augment, schema.Mixing, schema.Evaluation, schema.Optimizer, schema.Schedule):
        for field in dataclasses.fields(block):
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                assert re.search(rf"^  {field.name}:", text, re.M), f"{block.__name__}.{field.name}: no yaml uses it"


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 150
    targets = set(re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text(), re.M)) | {p.stem for p in YAMLS}
    for target in re.findall(r"^make ([a-z0-9_]+)", readme, re.M):
        assert target in targets, f"README calls make {target}"
    for path in re.findall(r"\b(?:yamls|recipes|vitcomposer|benchmarks|tests)/[\w./]+\w", readme):
        assert (ROOT / path).exists(), f"README names {path}"
    for page in YAMLS:
        assert f"yamls/{page.name}" in readme, f"README's table lacks {page.name}"


def test_every_pin_has_the_hashes_that_set_up_requires() -> None:
    entries = re.split(r"\n(?=\S)", (ROOT / "constraints.txt").read_text().strip())
    without = [entry for entry in entries if not re.match(r"[\w.-]+==\S+.*--hash=sha256:[0-9a-f]{64}", entry, re.S)]
    assert len(entries) > 100 and without == []
    assert "--require-hashes" in (ROOT / "Makefile").read_text()


def test_every_requirement_of_the_project_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[<>=\[ ;]", each)[0].lower().replace("_", "-") for each in needed}
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    assert names <= pinned
