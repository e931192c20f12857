"""The stage interpret: what a motion means."""

from flexlib.interpret.run import interpret

__all__ = ["interpret"]
