"""Pictures of maps, for generate and report."""
