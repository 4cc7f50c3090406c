"""What yamls, README, docs and constraints.txt say is so: headers, families, links, commands, pins."""

import dataclasses
import random
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.test_structure import LAYERS, ROOT, YAMLS, is_module, measured
from vitcomposer import __version__, cli, config
from vitcomposer.data.augment.policies import RandAugment
from vitcomposer.installed import SECOND_STEP
from vitcomposer.schema import CONFIGS, pages

RECIPES = {path.stem for path in YAMLS}
LOCKS = ("constraints.txt", "constraints-torch-2.7.txt")


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


def test_the_newest_version_of_the_changelog_is_that_of_the_package() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    versions = [heading for heading in headings if heading != "Unreleased"]
    assert versions == headings[-len(versions) :]  # what no version has yet stands above them
    assert re.fullmatch(rf"{re.escape(__version__)} \(20\d\d-\d\d-\d\d\)", versions[0])
    assert f"vitcomposer-{__version__}-py3-none-any.whl" in (ROOT / "docs/set_up.md").read_text()


PAGES = [ROOT / "README.md", ROOT / "yamls/README.md", ROOT / "recipes/RECORDS.md", *sorted(ROOT.glob("docs/*.md"))]


README = (ROOT / "README.md").read_text()


def code_of(text: str) -> str:
    """What stands in its blocks of bash."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))


def section_of(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_readme_is_short_and_its_targets_exist() -> None:
    assert len(README.splitlines()) <= 90
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) > 3 and [line for block in blocks for line in block.splitlines() if len(line) > 100] == []
    targets = set(re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text(), re.M)) | {p.stem for p in YAMLS}
    for page in PAGES:
        for target in re.findall(r"^make ([a-z0-9_]+)", code_of(page.read_text()), re.M):
            assert target in targets, f"{page.name} calls make {target}"
    assert "(docs/architecture.md)" in section_of(README, "The code")


def test_readme_has_every_yaml_and_no_other() -> None:
    """In the rows of its table, by its name."""
    names = re.findall(
        r"[a-z]\w+", " ".join(re.findall(r"^\| [^|]+ \| (`[^|]+`) \|", section_of(README, "Recipes"), re.M))
    )
    assert sorted(names) == [path.stem for path in YAMLS]


def test_figures_that_readme_gives_stand_in_the_results_that_it_links() -> None:
    results = {path.name: path.read_text() for path in ROOT.glob("benchmarks/results/*.md")}
    assert "**vitcomposer, seekable JPEG** | 475 [" in results["input_full.md"]
    for peer, figure in (("tf.data, bilinear without antialias", 357), ("FFCV, JPEG", 267), ("timm transforms", 149)):
        assert re.search(rf"^\| {peer}[^|]*\| {figure} \[", results["input_full.md"], re.M)
    assert "| 30.22 +- 0.65 |" in results["against_timm.md"] and "| 29.77 +- 1.13 |" in results["against_timm.md"]
    faults = results["faults.md"]
    rows = len(re.findall(r"^\| ", faults, re.M)) - 1
    assert f"{rows} faults, " in faults and f"[{rows} faults](" in README
    assert "| kill -9 of 2 ranks, 20 times, supervised | the same bits as without;" in faults
    for figure in ("475 crops", "tf.data 357", "FFCV 267", "timm 149", "30.2 +- 0.7", "29.8 +- 1.1", "killed 20 times"):
        assert figure in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_what_exists(page: Path) -> None:
    """Its relative links lead to files; paths, tests and modules that it names are there."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text) + re.findall(r"<img src=\"([^\"]+)\"", text)
    for link in links:
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
    lines = code_of(page.read_text()).replace("\\\n", " ").splitlines()
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
        named = command[1:2] if command[0] == "make" else [word for word in command[2:] if word in RECIPES]
        recipe += [f"yamls/{name}.yaml" for name in named]
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


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_the_hashes_that_set_up_requires(lock: str) -> None:
    first, *entries = re.split(r"\n(?=\S)", (ROOT / lock).read_text().strip())
    assert re.fullmatch(rf"# {lock}: 1\d\d packages, \d\.\d GB to fetch .*", first)  # on one platform
    without = [entry for entry in entries if not re.match(r"[\w.-]+==\S+.*--hash=sha256:[0-9a-f]{64}", entry, re.S)]
    assert len(entries) > 100 and without == []
    assert "--require-hashes" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_of_the_project_is_pinned(lock: str) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    needed = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *pyproject["dependency-groups"]["composer"],
    ]
    assert SECOND_STEP.endswith(" ".join(pyproject["dependency-groups"]["composer"]))
    names = {re.split(r"[<>=\[ ;]", each)[0].lower().replace("_", "-") for each in needed}
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / lock).read_text(), re.M))
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
