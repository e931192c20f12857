"""The stage prepare."""
