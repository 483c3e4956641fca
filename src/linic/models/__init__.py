"""Model families and presets. `build("lalic-xs")` -> a torch module with fresh weights, in its training form.

One family, one whole file (lalic.py); blocks.py holds what families share; presets/ are data.
"""

from linic.models.config import Config, preset, presets
from linic.models.lalic import Lalic

FAMILIES: dict[str, type[Lalic]] = {"lalic": Lalic}
PRESETS = presets()

__all__ = ["FAMILIES", "PRESETS", "Config", "Lalic", "build", "preset"]


def build(model: str | Config) -> Lalic:
    """A fresh model of a preset (by name) or a Config. Raises UsageError for an unknown name."""
    config = preset(model) if isinstance(model, str) else model
    return FAMILIES[config.family](config)
