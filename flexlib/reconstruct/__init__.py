"""The stage reconstruct."""
