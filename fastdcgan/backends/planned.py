"""Names of backends that have no kernels in this version: asking for one says so."""

from __future__ import annotations

from fastdcgan.backends.base import Backend, Unavailable


class PlannedBackend(Backend):
    """A backend that this version does not have yet."""

    def __init__(self, name: str) -> None:
        self.name = name

    def require(self) -> None:
        raise Unavailable(
            f"backend {self.name!r} has no kernels in this version of fastdcgan; use 'auto', 'cpu' or 'reference'"
        )
