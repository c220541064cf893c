"""Merge methods: one file each, a typed function whose signature is its schema."""

from consilience.methods.registry import load, names
from consilience.methods.signature import Default, Method, Parameter, PerExpert, Range, TensorSpec, method

__all__ = ["Default", "Method", "Parameter", "PerExpert", "Range", "TensorSpec", "load", "method", "names"]
