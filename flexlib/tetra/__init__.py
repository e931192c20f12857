"""The tetrahedral mesh and what lives on it, whoever uses it."""
