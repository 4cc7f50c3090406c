"""Parses yaml and ``key=value`` into trees of text: the type of its key decides what a scalar means, never its looks.

YAML 1.1 reads 010 as 8, 12:30 as 750, no as false and 1e5 as text; a name of a run is none of these.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vitcomposer.config.foreign_names import ours_for
from vitcomposer.errors import ConfigError, did_you_mean
from vitcomposer.shipped import YAMLS

Tree = dict[str, Any]  # of Tree, lists and str

MAX_DEPTH, MAX_VALUES = 20, 100_000  # of a page: aliases within aliases grow without bound
_KINDS = ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "map", "seq")
_STANDARD = {f"tag:yaml.org,2002:{name}" for name in _KINDS}
_KEY = re.compile(r"[^\W\d][\w-]*(\.[\w-]+)*")
_INDEXED = re.compile(r"([\w.-]+?)(\.\d+|\[-?\d+\])+")


class Plain(str):
    """A scalar that was written without quotes, so that it may mean a number, true, false or null."""

    __slots__ = ()


def is_null(value: Any) -> bool:
    """Whether a value of a tree stands for nothing."""
    return isinstance(value, Plain) and value in ("", "~", "null", "Null", "NULL")


def find_page(path: Path) -> Path:
    """The yaml of ours that a name such as ``deit_s`` stands for, where no file has that name; else the path itself."""
    ours = YAMLS / f"{path}.yaml"
    return ours if _is_name(path) and not path.is_file() and ours.is_file() else path


def _is_name(path: Path) -> bool:
    """Whether it has neither a folder nor a suffix."""
    return path.parent == Path() and not path.suffix


def read_page(path: Path) -> Tree:
    """A yaml file as a tree.

    Raises:
        ConfigError: There is no such file, or it is not UTF-8, not yaml, empty, or no mapping.
    """
    if path.is_dir():
        raise ConfigError(f"{path} must be a yaml file, it is a folder. Name a file in it, such as config.yaml.")
    if not path.is_file():
        near = sorted(p.as_posix() for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        near += sorted(p.stem for p in YAMLS.glob("*.yaml")) if _is_name(path) else []
        raise ConfigError(f"There is no yaml at {path}.{did_you_mean(path.as_posix(), near)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. See who may read it.") from error
    page = _parse(_decode(content, path), str(path))
    if page is None or is_null(page):
        raise ConfigError(f"{path} must hold keys and values, it is empty. Start with recipe: supervised.")
    if not isinstance(page, dict):
        what = "a list" if isinstance(page, list) else "a text"
        raise ConfigError(f"{path} must hold keys and values, got {what}. Start with recipe: supervised.")
    return page


def _decode(content: bytes, path: Path) -> str:
    remedy = "Save it as UTF-8."
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path} must be text in UTF-8, it is in UTF-16. {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} must be text in UTF-8, line {line} is not. {remedy}") from error


def _parse(text: str, where: str) -> Any:
    """The tree of a yaml text, None for no text at all."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Reader(where).read(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        what = error.problem or error.context or "it cannot be parsed"
        tab = " (a tab; indent with spaces)" if r"'\t'" in what else ""
        raise ConfigError(f"{where} must be readable yaml,{line} {what}{tab}. Mend that line.") from error
    except yaml.YAMLError as error:  # a character that yaml does not allow
        what = str(error).splitlines()[0]
        raise ConfigError(f"{where} must be readable yaml, it holds {what}. Take that character out.") from error
    except RecursionError as error:
        raise ConfigError(f"{where} must be readable yaml, it is nested too deeply. Mend its brackets.") from error


class _Reader:
    """Turns yaml's nodes into a tree, within bounds."""

    def __init__(self, where: str) -> None:
        self._where, self._values = where, 0

    def read(self, node: yaml.Node, depth: int = 0) -> Any:
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            self._refuse(node, f"it has more than {MAX_DEPTH} levels or {MAX_VALUES:,} values")
        if node.tag not in _STANDARD:
            self._refuse(node, f"{node.tag.replace('tag:yaml.org,2002:', '!!')} is no kind of value here")
        if isinstance(node, yaml.ScalarNode):
            if node.style is not None:
                return str(node.value)
            return Plain("null" if node.value == "~" else node.value)  # elsewhere ~ is the home folder
        if isinstance(node, yaml.SequenceNode):
            return [self.read(each, depth + 1) for each in node.value]
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, depth)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> Tree:
        tree: Tree = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "a key must be one word")
            name = str(key.value)
            if name == "<<":
                merged = self.read(value, depth + 1)
                if not isinstance(merged, dict):
                    self._refuse(value, "<< must refer to keys and values")
                tree = {**merged, **tree}
                continue
            line = key.start_mark.line + 1
            if name in lines:
                self._refuse(key, f"{name} stands there for the second time, the first is in line {lines[name]}")
            lines[name] = line
            tree[name] = self.read(value, depth + 1)
        return tree

    def _refuse(self, node: yaml.Node, what: str) -> NoReturn:
        line = node.start_mark.line + 1
        raise ConfigError(f"{self._where} must be readable yaml, in line {line} {what}. Mend that line.")


def read_overrides(overrides: Iterable[str], problems: list[str]) -> list[tuple[str, Any]]:
    """Key and value of each ``dotted.key=value``; what cannot be read is added to ``problems``."""
    changes: list[tuple[str, Any]] = []
    is_value = False  # of the option before: --epochs 300
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        if is_value and not equals and not key.startswith("-"):
            is_value = False
            continue
        is_value = key.startswith("-") and not equals
        if not equals or not key or key[0] in "-+":
            ours = ours_for(key)
            remedy = f"Use {ours}." if ours else "Write it like max_duration=100ep."
            problems.append(f"{key or text} must be of the form key=value, got {text!r}. {remedy}")
        elif _INDEXED.fullmatch(key):
            whole = re.sub(r"(\.\d+|\[-?\d+\])+$", "", key)
            problems.append(f"{key} must be given as a whole list, got one entry. Write {whole}=[..., ...].")
        elif not _KEY.fullmatch(key):
            problems.append(f"{key} must be names joined by dots, got {key!r}. Write it like optimizer.lr.")
        else:
            try:
                changes.append((key, _parse_value(key, value)))
            except ConfigError as error:
                problems.extend(error.problems)
    return changes


def _parse_value(key: str, text: str) -> Any:
    try:
        found = _parse(text, key)
    except ConfigError as error:
        if not isinstance(error.__cause__, yaml.MarkedYAMLError):
            raise
        quoted = "'\"" + text.replace('"', "") + "\"'"
        raise ConfigError(
            f"{key} must be a value that yaml can read, got {text!r}. Close its brackets and quotes, or quote the "
            f"whole: {key}={quoted}."
        ) from error
    # What looks like a comment belongs to the text: a command line has none.
    return Plain(text) if found is None or (isinstance(found, Plain) and " #" in text) else found
