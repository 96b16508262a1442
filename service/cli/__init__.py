"""The commands: parse the arguments, call, print."""

from .main import main

__all__ = ["main"]
