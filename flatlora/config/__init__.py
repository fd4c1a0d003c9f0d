"""The typed, frozen description of one experiment: how a section is declared, the sections, and `parse`."""

from flatlora.config.experiment import Experiment, parse
from flatlora.config.settings import Section, build_section, setting
from flatlora.utils.errors import ConfigError

__all__ = ["ConfigError", "Experiment", "Section", "build_section", "parse", "setting"]
