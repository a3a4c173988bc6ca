"""Faults under load, with real processes."""
