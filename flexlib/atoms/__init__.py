"""Atomic models: read, carried by a mesh, checked against a map, and written as ensembles."""
