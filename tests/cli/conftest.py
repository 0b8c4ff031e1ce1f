"""The commands are tried on the short runs that the tests of the DCGAN have."""

from tests.dcgan.conftest import _one_thread, _own_cache, trained_run  # noqa: F401
