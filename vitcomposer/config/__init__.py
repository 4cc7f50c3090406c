"""From a yaml and ``key=value`` overrides to a frozen dataclass."""

from vitcomposer.config.load import ENVIRONMENT, load, to_yaml
from vitcomposer.errors import ConfigError

__all__ = ["ENVIRONMENT", "ConfigError", "load", "to_yaml"]
