"""Measurements on a reloaded checkpoint; none of them knows which method made it."""
