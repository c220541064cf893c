"""Consilience: one model from many experts."""
