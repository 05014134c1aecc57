"""The version of Limbeck, read by the build."""

__version__ = "0.1.0"
