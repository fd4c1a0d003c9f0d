"""The typed, frozen configuration of one experiment: its sections, how they are declared, and `parse`."""

from flatlora.config.experiment import Experiment, parse
from flatlora.config.settings import Section, build_section, setting
from flatlora.utils.errors import ConfigError

__all__ = ["ConfigError", "Experiment", "Section", "build_section", "parse", "setting"]
