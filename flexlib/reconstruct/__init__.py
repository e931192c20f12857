"""The stage reconstruct."""

from flexlib.reconstruct.run import reconstruct

__all__ = ["reconstruct"]
