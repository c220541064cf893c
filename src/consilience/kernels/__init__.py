"""Numba kernels: each works on one cache-sized block. Importing any of them imports numba."""
