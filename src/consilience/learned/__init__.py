"""Learned methods: one file each, and the run they share."""
