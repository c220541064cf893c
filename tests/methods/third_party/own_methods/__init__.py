"""Merge methods of somebody else."""
