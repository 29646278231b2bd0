"""Leaderboards, made from records alone."""
