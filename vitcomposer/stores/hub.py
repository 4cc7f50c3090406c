"""Fetches published weights by name, ``timm:NAME.TAG`` and ``hf:OWNER/NAME``, through timm and huggingface_hub.

What huggingface_hub has in its cache (``HF_HOME``) is not fetched again, and nothing is fetched where
``HF_HUB_OFFLINE`` is set.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcomposer.errors import did_you_mean
from vitcomposer.json_file import read_json

_KINDS = ("timm:", "hf:")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILES = ("model.safetensors", "pytorch_model.bin")
_FREE = "timm:vit_small_patch14_dinov2.lvd142m (Apache-2.0) needs no permission."


@dataclass(frozen=True)
class OnHub:
    """Weights of a hub, on this machine.

    Attributes:
        file: In huggingface_hub's cache.
        repository: With its commit.
        licence: As the repository or timm says; None where neither does.
        input: What its ``pretrained_cfg`` says of the images: ``mean``, ``std``, ``crop_ratio``, ``interpolation``,
            those that are there.
    """

    file: Path
    repository: str
    licence: str | None
    input: dict[str, Any]


def is_on_hub(source: object) -> bool:
    """Whether these weights are named by a hub and not by a path."""
    return isinstance(source, str) and source.startswith(_KINDS)


def check_address(address: str) -> str | None:
    """What is wrong with the form of an address, without looking it up."""
    kind, _, name = address.partition(":")
    if kind == "hf" and not _REPOSITORY.fullmatch(name):
        return f"must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got {address!r}. Copy it from the repository's page."
    if kind == "timm" and not re.fullmatch(r"\w+(\.\w+)?", name):
        return f"must be timm:NAME or timm:NAME.TAG, got {address!r}. timm.list_pretrained() names them."
    return None


def fetch_from_hub(address: str) -> OnHub:
    """The weights of an address, from the cache or from the hub.

    Raises:
        ValueError: No such weights, or they cannot be had: the network, a permission, offline mode.
    """
    if problem := check_address(address):
        raise ValueError(f"init.weights {problem}")
    kind, _, name = address.partition(":")
    known: dict[str, Any] = {}
    repository, _, revision = name.partition("@")
    names: tuple[str, ...] = _FILES
    if kind == "timm":
        repository, names, known = _of_timm(name)
    file = _first_of(repository, names, revision or None, address)
    page = _page(repository, revision or None, address)
    settings = page.get("pretrained_cfg", page) if isinstance(page.get("pretrained_cfg", page), Mapping) else {}
    licence = known.get("license") or _licence(repository, revision or None, address)
    return OnHub(
        file=file,
        repository=f"{repository} at {file.parent.name[:12]}",
        licence=licence,
        input=_input({**settings, **{key: value for key, value in known.items() if value is not None}}),
    )


def _of_timm(name: str) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Repository, names of its files and settings of one of timm's weights."""
    import timm

    found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if found is None or name not in (*timm.list_pretrained(), str(found.architecture)):
        hint = did_you_mean(name, timm.list_pretrained())
        raise ValueError(f"init.weights must be weights that timm {timm.__version__} knows, got 'timm:{name}'.{hint}")
    if not found.hf_hub_id:
        raise ValueError(
            f"init.weights must be on the Hugging Face hub, timm:{name} is not. Fetch {found.url or 'its file'} and "
            "set init.weights=FILE."
        )
    names = (found.hf_hub_filename,) if found.hf_hub_filename else _FILES
    known = {key: getattr(found, key) for key in ("license", "mean", "std", "crop_pct", "interpolation")}
    return str(found.hf_hub_id), names, known


def _first_of(repository: str, names: tuple[str, ...], revision: str | None, address: str) -> Path:
    absent: ValueError | None = None
    for name in names:
        try:
            file = _download(repository, name, revision, address)
        except ValueError as error:  # the cache may have the other one
            absent = absent or error
            continue
        if file is not None:
            return file
    if absent is not None:
        raise absent
    raise ValueError(
        f"init.weights must be a repository with {' or '.join(names)}, {address} has none. Fetch the file that you "
        "mean, and set init.weights=FILE."
    )


def _page(repository: str, revision: str | None, address: str) -> dict[str, Any]:
    file = _download(repository, "config.json", revision, address)
    content = None if file is None else read_json(file)
    return content if isinstance(content, dict) else {}


def _licence(repository: str, revision: str | None, address: str) -> str | None:
    """As the front matter of the repository's README.md says."""
    file = _download(repository, "README.md", revision, address)
    text = "" if file is None else file.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.findall(r"^(license(?:_name)?): *['\"]?([^'\"\n]+)", front[1], re.M) if front else []
    said = dict(found)
    return said.get("license_name") or said.get("license")


def _download(repository: str, name: str, revision: str | None, address: str) -> Path | None:
    """The path of a file, None where the repository has no such file."""
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"init.weights={address} is gated: accept its terms at {constants.ENDPOINT}/{repository} and set HF_TOKEN "
            f"of that account (or `hf auth login`). {_FREE}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if name not in _FILES:  # beside weights that are there
            return None
        if constants.HF_HUB_OFFLINE:
            why = f"in the cache {constants.HF_HUB_CACHE} while HF_HUB_OFFLINE is set"
        else:
            why = f"in the cache {constants.HF_HUB_CACHE}, or {constants.ENDPOINT} within reach"
        remedy = f"Run `hf download {repository}` where there is a network and bring its folder there"
        raise ValueError(f"init.weights={address} must be {why}, it is not. {remedy}.") from error
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(
            f"init.weights={address} must name a repository that {constants.ENDPOINT} has and shows to you, there is "
            f"no {repository}. Mend the name, or set HF_TOKEN where it is private."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"init.weights={address} cannot be fetched: {line}. Try again, or set init.weights=FILE."
        ) from error


def _input(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("mean", "std"):
        values = settings.get(key)
        if isinstance(values, list | tuple) and len(values) == 3 and all(type(each) in (int, float) for each in values):
            found[key] = tuple(float(each) for each in values)
    crop = settings.get("crop_pct")
    if isinstance(crop, int | float) and 0.1 <= crop <= 1:
        found["crop_ratio"] = float(crop)
    if settings.get("interpolation") in ("bicubic", "bilinear"):
        found["interpolation"] = settings["interpolation"]
    return found
