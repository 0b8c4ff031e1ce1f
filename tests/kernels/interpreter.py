"""A process in which Triton interprets its kernels, and which runs tests there one by one as it is asked to."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol


class Interpreter:
    """The process, seen from the one that wants the tests run."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        """Start it; it will collect the tests of `folder`."""
        self._config = config
        self._arguments = [f"--rootdir={config.rootpath}", "-o", "addopts=", "-p", "no:cacheprovider", str(folder)]
        if config.inipath is not None:
            self._arguments += ["-c", str(config.inipath)]
        handle, self._log = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, self._arguments, self._log), daemon=True)
        self._process.start()
        there.close()

    def run(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of the test, or that of its failure if the process dies; then another one takes its place."""
        try:
            self._connection.send(item.nodeid)
            found = self._connection.recv()
        except (EOFError, OSError):
            call = pytest.CallInfo.from_call(self._died, "call")
            self._start()
            return [pytest.TestReport.from_item_and_call(item, call)]
        hook = self._config.hook
        return [hook.pytest_report_from_serializable(config=self._config, data=data) for data in found]

    def _died(self) -> None:
        self._process.join()
        output = Path(self._log).read_text(errors="replace")
        raise RuntimeError(f"the interpreter's process ended with {self._process.exitcode}:\n{output}")

    def close(self) -> None:
        self._connection.close()
        self._process.join()
        os.unlink(self._log)


class _Server:
    """A plugin for pytest that runs the tests whose node ids it receives, and sends their reports back."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        hook = session.config.hook
        while True:
            try:
                item = items[self._connection.recv()]
            except EOFError:  # the other side has closed
                return True
            reports = runtestprotocol(item, log=False, nextitem=None)
            self._connection.send(
                [hook.pytest_report_to_serializable(config=session.config, report=report) for report in reports]
            )


def _serve(connection: Connection, arguments: list[str], log: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    output = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    raise SystemExit(pytest.main(arguments, plugins=[_Server(connection)]))
