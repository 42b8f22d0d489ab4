"""Planted faults of batch norms, healthy models beside them, and who finds what: bnext's doctor and its peers."""
