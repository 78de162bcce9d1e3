"""Settings, under the name by which scripts of users import them; they are in `config/settings.py`."""

from .config.settings import Settings, SettingsError

__all__ = ["Settings", "SettingsError"]
