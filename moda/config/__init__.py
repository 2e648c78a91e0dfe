"""The configuration: one typed schema, YAML files over its defaults, dot-list overrides over those."""

from .load import load_config, read_config, to_yaml
from .schema import RunConfig

__all__ = ["RunConfig", "load_config", "read_config", "to_yaml"]
