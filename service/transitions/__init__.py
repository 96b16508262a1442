"""A change of a session, without I/O: its order, and how it is stored and sent."""

from .lifecycle import Status
from .transition import StatusTransition

__all__ = ["Status", "StatusTransition"]
