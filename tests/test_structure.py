"""The design's rules that a reader could break without noticing: layers, sizes, headers, and what README names."""

import ast
import dataclasses
import io
import random
import re
import shlex
import tokenize
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from vitcomposer import cli, config
from vitcomposer.data.augment.policies import RandAugment
from vitcomposer.runs import layout
from vitcomposer.schema import CONFIGS, pages

ROOT = Path(__file__).resolve().parent.parent
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
SOURCES = [*ROOT.glob("vitcomposer/**/*.py"), *ROOT.glob("recipes/*.py"), ROOT / "train.py"]

CODEC = "vitcomposer.data.jpeg"  # which could leave as a package of its own
LAYERS = {
    "vitcomposer": 0,
    "vitcomposer.errors": 0,
    "vitcomposer.escape": 0,
    "vitcomposer.shipped": 0,
    "vitcomposer.collectives": 0,
    "vitcomposer.json_file": 0,
    "vitcomposer.whole_files": 0,
    "vitcomposer.runs.layout": 0,
    "vitcomposer.folder_lock": 1,
    "vitcomposer.data.jpeg": 1,
    "vitcomposer.schema": 2,
    "vitcomposer.losses": 1,
    "vitcomposer.optim": 3,
    "vitcomposer.curriculum": 3,
    "vitcomposer.origins": 3,
    "vitcomposer.config": 4,
    "vitcomposer.stores": 4,
    "vitcomposer.models": 4,
    "vitcomposer.data": 5,
    "vitcomposer.needed_files": 6,
    "vitcomposer.teacher": 6,
    "vitcomposer.runs": 6,
    "vitcomposer.cost": 7,
    "vitcomposer.evaluation": 7,
    "vitcomposer.algorithms": 7,
    "vitcomposer.tasks": 8,
    "vitcomposer.export": 8,
    "vitcomposer.launch": 8,
    "vitcomposer.callbacks": 9,
    "vitcomposer.training": 10,
    "vitcomposer.commands": 11,
    "vitcomposer.cli": 12,
    "vitcomposer.__main__": 13,
    "recipes": 14,
    "vitcomposer.train": 15,
    "train": 16,
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
    """A file or a folder directly below the package, or the codec: its own files may import each other."""
    return CODEC if f"{module}.".startswith(f"{CODEC}.") else ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_only_downwards(path: Path) -> None:
    own = module_name(path)
    for other in imports(path):
        if unit(own) == unit(other) or (own == "recipes" and unit(other).startswith("recipes.")):
            continue
        assert not (own.startswith("recipes.") and other.startswith("recipes.")), "a recipe never imports another"
        below = layer(other) < layer(own) or (unit(other) == "vitcomposer.schema" and layer(own) == 0)
        assert below, f"{own} imports {other}, which is not below it"


def test_the_codec_imports_nothing_of_ours_but_errors() -> None:
    for path in SOURCES:
        if unit(module_name(path)) == CODEC:
            assert {unit(other) for other in imports(path)} <= {CODEC, "vitcomposer.errors"}, path


def test_models_and_losses_never_import_composer() -> None:
    for path in [*ROOT.glob("vitcomposer/models/*.py"), *ROOT.glob("vitcomposer/losses/*.py")]:
        assert not re.search(r"^\s*(from|import) (composer|streaming)\b", path.read_text(), re.M), path


def test_a_configuration_has_a_type_and_is_not_asked_which_recipe_it_is() -> None:
    """``schema.recipe.Recipe`` has what every recipe has; what only some have is behind an isinstance."""
    outside = [path for path in SOURCES if "config" not in path.parts]
    assert len(outside) > 100
    for path in outside:
        found = re.findall(r"\b(?:has|get)attr\(\s*(?:cfg|recipe)\b.*|\b(?:cfg|recipe): Any\b.*", path.read_text())
        assert found == [], path


def texts(path: Path) -> Iterator[str]:
    """The strings of a module, without its docstrings."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_names_of_files_in_a_run_folder_are_spelled_in_its_layout_alone() -> None:
    """A sentence for a user may name them. The stored data sets of data/ have files of their own."""
    names = [value for key, value in vars(layout).items() if key.isupper() and isinstance(value, str)]
    files = {Path(name).name for name in names if "." in name}
    assert {"config.yaml", "latest-rank0.pt", "metrics.jsonl", "whole.json"} <= files
    folders = "|".join(name for name in names if "." not in name)
    folder = re.compile(rf'(?:/|Path\([^()]*,) "(?:{folders})"')
    assert folder.search('Path(source, "checkpoints")') and folder.search('run / "checkpoints" / name')
    for path in SOURCES:
        if module_name(path).startswith(("vitcomposer.data.", "vitcomposer.runs.layout")):
            continue
        assert [text for text in texts(path) if files & set(text.split("/"))] == [], path
        assert folder.findall(path.read_text()) == [], path


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_file_is_under_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_first_line_of_a_module_says_what_it_does(path: Path) -> None:
    """In one line, so that ``head -1`` of all files is a guide to them."""
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    assert len(first.split()) >= 5 and (first[-1] in ".:" or path.name == "train.py")


def lines_of_code_and_comment(path: Path) -> tuple[int, int]:
    """Lines with code, docstrings not counted, and lines with a comment, at their end too, other than for ruff."""
    text = path.read_text()
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments |= set() if token.string.startswith("# noqa") else {token.start[0]}
        elif token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code), len(comments)


@pytest.mark.parametrize("path", sorted(ROOT.glob("vitcomposer/**/*_kernels.py")), ids=module_name)
def test_kernels_have_8_lines_of_comment_for_100_of_code(path: Path) -> None:
    code, comments = lines_of_code_and_comment(path)
    assert comments >= 8 * code / 100, f"{comments} comments on {code} lines of code"


def test_benchmarks_and_tests_are_imported_by_their_names() -> None:
    """As packages of the checkout: one that changes the search path may take another project's module of that name."""
    change = re.compile(r"\bsys\.path\b|\bsyspath_prepend\b")
    files = [path for folder in ("benchmarks", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    assert [path for path in files if path != Path(__file__) and change.search(path.read_text())] == []
    folders = {path.parent for path in files}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_train_is_under_60_lines() -> None:
    assert len((ROOT / "vitcomposer/train.py").read_text().splitlines()) < 60


def measured(name: str) -> str | None:
    """The figure that recipes/RECORDS.md gives a yaml as it is, as the start of its column; None if it was not run."""
    rows = [line.split(" | ") for line in (ROOT / "recipes/RECORDS.md").read_text().splitlines() if line[:3] == "| 2"]
    found = [row[3] for row in rows if row[1] == f"[{name}](../yamls/{name}.yaml)"]
    return re.sub(r"^k-NN \(k 20\) ", "", found[0]).split(" +-")[0] if found else None


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_header_says_what_is_expected_measured_and_spent_and_how_it_is_started(path: Path) -> None:
    header = path.read_text().partition("\nrecipe:")[0].splitlines()
    assert all(line.startswith("# ") for line in header)
    assert re.search(r"arXiv:\d{4}\.\d{5}|scikit-learn", header[0])
    lines = dict(
        re.findall(r"^# ([A-Z][\w -]+): (.+)", line)[0] for line in header if re.match(r"# [A-Z][\w -]+: ", line)
    )
    assert re.match(r"\d\d(\.\d)? |\d\d\.\d,|none published; \d|not published |depends on ", lines["Expected top-1"])
    assert re.match(r"[\d.]+ (GFLOP|PFLOP|EFLOP)|about [\d.]+ minutes", lines["Cost"])
    record = measured(path.stem)
    said = lines["Measured top-1"]
    assert said.startswith(f"{record} " if record else "not run (recipes/RECORDS.md)") or said.startswith(f"{record},")
    assert "recipes/RECORDS.md" in said
    commands = [re.split(r"train\.py |cache-teacher ", line)[1] for line in header if re.search(r"^#   .*yamls/", line)]
    assert any(command.split()[0] == f"yamls/{path.name}" for command in commands)
    for command in commands:
        page, *overrides = re.sub(r" --[\w-]+ \S+", "", command).split()
        config.load(ROOT / page, overrides)  # an override that is no key raises


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_overrides_that_a_header_offers_make_a_configuration(path: Path) -> None:
    """Each set of them begins with its name and a colon and may go on in the next lines."""
    sets: list[list[str]] = []
    for line in path.read_text().partition("\nrecipe:")[0].splitlines():
        words = [word.rstrip(",.") for word in line.split() if re.match(r"[a-z_]+(\.[a-z_]+)*=[a-z\d\[]", word)]
        if re.search(r"^# +\S[^=]*: [a-z_.]+=", line):
            sets.append([])
        if words and "train.py" not in line:
            sets[-1] += words
    for overrides in sets:
        config.load(path, overrides)
    assert sets or not path.stem.startswith("swav_") or path.stem == "swav_demo"


def differing_keys(names: tuple[str, ...]) -> set[str]:
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


def test_yamls_whose_rand_augment_is_written_differently_draw_differently() -> None:
    """Of one string, m15 and m10 were two names of one thing: timm cuts what it is given at 10."""
    names = {config.load(path).augment.rand_augment for path in YAMLS if "augment:" in path.read_text()} - {None}
    draws = {}
    for name in sorted(names):
        policy = RandAugment(name, image_size=224, interpolation="bicubic")
        draws[name] = repr([policy.draw(random.Random(seed)) for seed in range(50)])
    assert len(names) > 2 and len(set(draws.values())) == len(names)


def blocks(cls: type, prefix: str = "") -> Iterator[tuple[type, str]]:
    """Dotted keys of a recipe's page and of its blocks, with the class that each is a field of."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield cls, prefix + field.name
        for inner in typing.get_args(hints[field.name]) or (hints[field.name],):
            if dataclasses.is_dataclass(inner):
                yield from blocks(typing.cast(type, inner), f"{prefix}{field.name}.")


def test_every_field_of_the_schema_is_set_by_a_yaml_or_by_a_test() -> None:
    """In its own block: an option that nothing uses is none."""
    pages = [yaml.safe_load(path.read_text()) for path in YAMLS]
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py") if path != Path(__file__))
    used: dict[tuple[str, str], bool] = {}
    for recipe, cls in CONFIGS.items():
        for owner, key in blocks(cls):
            field = key.rpartition(".")[2]
            by_yaml = any(is_set(page, key) for page in pages if page["recipe"] == recipe)
            by_test = re.search(rf"\b{re.escape(key)}\b|\b{field}=|\"{field}\"", tests) is not None
            used[owner.__name__, field] = used.get((owner.__name__, field), False) or by_yaml or by_test
    assert [name for name, found in used.items() if not found] == []


def is_set(page: typing.Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(page, dict) or part not in page:
            return False
        page = page[part]
    return True


PAGES = [ROOT / "README.md", ROOT / "yamls/README.md", ROOT / "recipes/RECORDS.md", *sorted(ROOT.glob("docs/*.md"))]


def test_readme_is_short_and_its_targets_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 150
    code = re.findall(r"^```bash\n(.*?)^```", readme, re.M | re.S)
    assert [line for block in code for line in block.splitlines() if len(line) > 100] == []
    targets = set(re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text(), re.M)) | {p.stem for p in YAMLS}
    for target in re.findall(r"^make ([a-z0-9_]+)", readme, re.M):
        assert target in targets, f"README calls make {target}"
    section = readme.partition("\n## The code\n")[2].partition("\n## ")[0]
    assert len(section.strip().splitlines()) <= 10 and "(docs/architecture.md)" in section


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_what_exists(page: Path) -> None:
    """Its relative links lead to files; paths, tests and modules that it names are there."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        assert "://" in link or (page.parent / link).exists(), f"a link leads to {link}"
    for path in re.findall(r"\b(?:yamls|recipes|vitcomposer|benchmarks|tests)/[\w./]+\w", text):
        assert (ROOT / path).exists(), f"it names {path}"
    for name in re.findall(r"\bfrom (vitcomposer[\w.]*) import\b", text):
        assert is_module(name), f"it imports {name}"
    named = set(re.findall(r"\btest_\w+", text))
    if named:
        there = {path.stem for path in ROOT.glob("tests/**/test_*.py")}
        there |= {
            name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
        }
        assert named <= there


class Parsed(Exception):
    """A command line was understood."""


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command of ours in a page's blocks of bash."""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S))
    lines = blocks.replace("\\\n", " ").splitlines()
    ours = r"(vitcomposer|composer|torchrun|make \w+ .*=)"
    return [shlex.split(line, comments=True) for line in lines if re.match(ours, line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are parsed, and keys belong to the yaml that they are given to."""

    def stop(_: object) -> None:
        raise Parsed

    monkeypatch.setattr(cli, "reading", stop)
    for command in commands_of(page):
        if "vitcomposer" in command:
            with pytest.raises(Parsed):
                cli.main(command[command.index("vitcomposer") + 1 :])
        recipe = [word for word in command if word.endswith(".yaml") and word.startswith("yamls/")]
        recipe += [f"yamls/{command[1]}.yaml"] if command[0] == "make" else []
        overrides = [word for word in command if re.match(r"[a-z_.]+=", word)]
        if recipe:
            config.load(ROOT / recipe[0], overrides)


def test_architecture_page_has_every_part_and_the_layers() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    parts = [path for path in ROOT.glob("vitcomposer/*") if path.suffix == ".py" or (path / "__init__.py").is_file()]
    parts += [path.parent for path in ROOT.glob("vitcomposer/*/*/__init__.py")]
    for name in sorted(path.name + "/" * path.is_dir() for path in parts if path.name != "__init__.py"):
        assert re.search(rf"^ *{re.escape(name)} |\b{re.escape(name)} is ", page, re.M), f"its tree lacks {name}"
    tree = page.partition("```\ntrain.py")[2].partition("```")[0]
    folders = re.findall(r"^  (  )?([a-z_]+)/ ", tree, re.M)
    assert {name for _, name in folders} == {path.name for path in parts if path.is_dir()}
    rows: dict[int, list[str]] = {}
    for module, number in LAYERS.items():
        short = module.removeprefix("vitcomposer.")
        rows.setdefault(number, []).append(module if short in LAYERS else short)  # there are two train
    layers = "\n".join("  ".join(sorted(rows[number])) for number in sorted(rows, reverse=True))
    assert f"```\n{layers}\n```" in page, f"docs/architecture.md must have the layers:\n{layers}"


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


def test_the_table_of_the_recipes_is_that_of_their_headers() -> None:
    assert (ROOT / "yamls/README.md").read_text() == pages.table(), "make yamls writes it"


def test_a_field_of_a_header_may_have_several_lines(tmp_path: Path) -> None:
    page = tmp_path / "x.yaml"
    page.write_text(
        "# A method.  A paper, arXiv:2012.12877.\n# Expected top-1: 80 (a\n#   reason).\n# Measured top-1: not run.\n"
        "# Cost: 1 EFLOP.\n# Deviates: none.\n#   composer -n 8 train.py yamls/x.yaml\nrecipe: supervised\n"
    )
    expected = pages.Page("x", "A method", "A paper, arXiv:2012.12877.", "80 (a reason).", "not run.", "1 EFLOP.")
    assert pages.read_page(page) == expected
    page.write_text(page.read_text().replace("# Cost: 1 EFLOP.\n", ""))
    with pytest.raises(ValueError, match=r"x.yaml must begin with.*it lacks \{'Cost'\}"):
        pages.read_page(page)
