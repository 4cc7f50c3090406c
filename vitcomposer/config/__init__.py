"""Reads a yaml and ``key=value`` overrides into a frozen dataclass, or reports every key that cannot be used."""

from vitcomposer.config.load import ENVIRONMENT, load, to_yaml
from vitcomposer.errors import ConfigError

__all__ = ["ENVIRONMENT", "ConfigError", "load", "to_yaml"]
