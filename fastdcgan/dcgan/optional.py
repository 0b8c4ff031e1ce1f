"""Packages that only some commands need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastdcgan.dcgan.sources import MissingPackage


@contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Turn an ImportError inside into a MissingPackage that says what to install for `what`."""
    try:
        yield
    except ImportError as error:
        raise MissingPackage(f"{what} need the package {package}: pip install {package}") from error
