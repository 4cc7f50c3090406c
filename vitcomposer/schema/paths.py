"""Expands the home folder in a path, for every key of a yaml and every argument of a command."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from vitcomposer.errors import require


def expand_home(value: Any, key: str = "") -> Any:
    """The same with each text that begins with ``~`` or ``~user`` as the path that a shell makes of it.

    Shells leave ``key=~/data`` and ``--out=~/x`` as they are. No text but a path begins so.

    Args:
        value: A text, a path, or lists, mappings and dataclasses of them; everything else is left alone.
        key: Of ``value``, for the message.

    Raises:
        ConfigError: There is no such user.
    """
    if isinstance(value, str | Path) and str(value).startswith("~"):
        path = os.path.expanduser(value)
        remedy = "Write the path out; ./ in front makes the ~ a part of a name."
        require(not path.startswith("~"), key, "a path whose ~ names a user of this machine", str(value), remedy)
        return type(value)(path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value) if each.init)
        changed = {name: new for name, old in fields if (new := expand_home(old, _below(key, name))) is not old}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, dict):
        entries = {name: expand_home(entry, _below(key, str(name))) for name, entry in value.items()}
        return value if all(entries[name] is value[name] for name in value) else entries
    if isinstance(value, list | tuple):
        items = [expand_home(item, key) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    return value


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
