"""The design's rules that a reader could break without noticing: layers, sizes, headers, and what README names."""

import ast
import io
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitcomposer.runs import layout

ROOT = Path(__file__).resolve().parent.parent
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
SOURCES = [*ROOT.glob("vitcomposer/**/*.py"), *ROOT.glob("recipes/*.py"), ROOT / "train.py"]

CODEC = "vitcomposer.data.jpeg"  # which could leave as a package of its own
ROWS = (  # an import goes from a row to a lower one, or within a folder
    ("train",),
    ("vitcomposer.__main__",),
    ("vitcomposer.cli",),
    ("vitcomposer.commands",),
    ("vitcomposer.train",),
    ("recipes",),
    ("vitcomposer.training",),
    ("vitcomposer.callbacks",),
    ("vitcomposer.export", "vitcomposer.launch", "vitcomposer.preview", "vitcomposer.report", "vitcomposer.tasks"),
    ("vitcomposer.algorithms", "vitcomposer.cost", "vitcomposer.evaluation"),
    ("vitcomposer.needed_files", "vitcomposer.runs", "vitcomposer.survey", "vitcomposer.teacher"),
    ("vitcomposer.data",),
    ("vitcomposer.config", "vitcomposer.models"),
    (
        "vitcomposer.curriculum",
        "vitcomposer.optim",
        "vitcomposer.origins",
        "vitcomposer.stores",
    ),
    ("vitcomposer.schema",),
    ("vitcomposer.data.jpeg", "vitcomposer.folder_lock", "vitcomposer.installed", "vitcomposer.losses"),
    (
        "vitcomposer",
        "vitcomposer.collectives",
        "vitcomposer.errors",
        "vitcomposer.escape",
        "vitcomposer.foundations",
        "vitcomposer.json_file",
        "vitcomposer.runs.layout",
        "vitcomposer.shipped",
        "vitcomposer.whole_files",
    ),
)
LAYERS = {module: number for number, row in enumerate(reversed(ROWS)) for module in row}


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


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Inside a room too, and where only the type checker looks."""
    waiting = {module_name(path): {other for other in imports(path) if is_module(other)} for path in SOURCES}
    while free := {module for module, others in waiting.items() if not (others - {module}) & waiting.keys()}:
        waiting = {module: others for module, others in waiting.items() if module not in free}
    assert waiting.keys() == set(), "each of them needs another that needs it, or one that does"


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


def test_functions_are_short() -> None:
    """Half of them have at most 7 lines, nine of ten at most 22, signature and docstring counted."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    deciles = statistics.quantiles(lengths, n=10)
    assert len(lengths) > 1500 and deciles[4] <= 7 and deciles[8] <= 22, deciles


def test_a_folder_has_at_most_16_modules() -> None:
    """Beside its __init__.py, so that a listing of it is read at a glance."""
    folders = Counter(path.parent for path in [*SOURCES, *ROOT.glob("benchmarks/**/*.py")] if path.stem != "__init__")
    assert ROOT / "benchmarks/input/candidates" in folders
    assert {str(folder): count for folder, count in folders.items() if count > 16} == {}


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
