"""Mirrors bnext/probes."""
