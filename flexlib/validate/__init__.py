"""The stage validate: two models that never met, one a half-set, and what they agree on."""

from flexlib.validate.run import validate

__all__ = ["validate"]
