"""Model families and presets. `build("lalic-xs")` -> a torch module with fresh weights, in its training form.

One family, one whole file: lalic.py; mrt.py, with its entropy model in rcm.py and its geometry in tokens.py.
blocks.py holds what families share; presets/ are data.
"""

from linic.models.config import AnyConfig, Config, MrtConfig, preset, presets
from linic.models.lalic import Lalic
from linic.models.mrt import Mrt

Model = Lalic | Mrt
PRESETS = presets()

__all__ = ["PRESETS", "AnyConfig", "Config", "Lalic", "Model", "Mrt", "MrtConfig", "build", "preset"]


def build(model: str | AnyConfig) -> Model:
    """A fresh model of a preset (by name) or a configuration. Raises UsageError for an unknown name."""
    config = preset(model) if isinstance(model, str) else model
    return Mrt(config) if isinstance(config, MrtConfig) else Lalic(config)
