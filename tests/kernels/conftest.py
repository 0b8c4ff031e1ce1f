"""The tests of the Triton kernels.

Those in this folder run the kernels in Triton's interpreter, which has to be asked for before Triton is imported. So
each process of pytest starts another one for them with TRITON_INTERPRET=1 (`interpreter.py`), and reports what became
of each test there as if it had run here. They run here, and can be debugged, where TRITON_INTERPRET=1 is set; and so
they do on a GPU, where FASTDCGAN_TEST_DEVICE=cuda is. Those in `compiled/` compile the kernels for GPUs that need not
be there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.kernels.interpreter import Interpreter
from tests.machine import DEVICE

FOLDER = Path(__file__).parent
# Where Triton is not installed, nothing here can even be imported: the header names that backend with this reason.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py", "compiled/*"]
_INTERPRETER = pytest.StashKey[Interpreter]()


def _interpreted_here() -> bool:
    from fastdcgan.backends.triton import interpreted

    return interpreted()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if FOLDER / "compiled" in item.path.parents and _interpreted_here():
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not item.get_closest_marker("interpreter") or DEVICE.type == "cuda" or _interpreted_here():
        return None
    config = item.config
    if _INTERPRETER not in config.stash:
        config.stash[_INTERPRETER] = Interpreter(config, FOLDER)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in config.stash[_INTERPRETER].run(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # what the test before this one left for its folder
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if _INTERPRETER in config.stash:
        config.stash[_INTERPRETER].close()


@pytest.fixture
def no_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter checks every integer operation for overflow, which takes most of its time."""
    from triton.runtime import interpreter

    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)
    )
