"""Settings of a run: the schema, YAML loading with overrides, batch arithmetic. Loads neither torch nor ray."""

from dvpo_ray.config.load import dump_config, load_config, override_config
from dvpo_ray.config.schema import Config

__all__ = ["Config", "dump_config", "load_config", "override_config"]
