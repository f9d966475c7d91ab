"""Runs each file of this folder by `start.py`, in a process of its own: they count what is in memory, and
ComfyUI can not be unloaded. What comes of their tests is reported as if they had run in this one."""

import ast
import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hosts import find_host, host_python, refuse

START = Path(__file__).with_name("start.py")
SECONDS = 900  # for all tests of a file
tried: set[Path] = set()  # the hosts of which all was imported once


def pytest_pycollect_makemodule(module_path, parent):
    return HostFile.from_parent(parent, path=module_path)


class HostFile(pytest.File):
    """A file of tests that is read and not imported: there may be no ComfyUI."""

    def collect(self):
        for statement in ast.parse(self.path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test_"):
                yield HostTest.from_parent(self, name=statement.name)

    @functools.cached_property
    def outcome(self) -> tuple[list[pytest.TestReport], str]:
        """The reports on those tests of this file that were chosen, and what the process printed."""
        host = find_host()
        chosen = [f"{self.path}::{item.name}" for item in self.session.items if item.parent is self]
        with tempfile.TemporaryDirectory() as folder:
            reports, output = Path(folder) / "reports", Path(folder) / "output"
            command = [host_python(), START, "--rootdir", self.config.rootpath, "--reports", reports]
            if host not in tried:
                tried.add(host)
                command.append("--try-all")
            with output.open("w") as printed:
                try:
                    subprocess.run(
                        command + chosen,
                        env=os.environ | {"COMFYUI_PATH": str(host)},
                        stdout=printed,
                        stderr=printed,
                        timeout=SECONDS,
                    )
                except subprocess.TimeoutExpired:
                    printed.write(f"\nIt was stopped after {SECONDS} s.")
            said = output.read_text(encoding="utf-8", errors="replace")
            if not reports.exists():
                refuse(host, said)
            read = self.config.hook.pytest_report_from_serializable
            written = map(json.loads, reports.read_text(encoding="utf-8").splitlines())
            return [read(config=self.config, data=report) for report in written], said


class HostTest(pytest.Item):
    """A test by its name, parametrized or not; the first one of a file runs all that were chosen."""

    def reportinfo(self):
        return self.path, None, self.name

    def runtest(self):
        reports, printed = self.parent.outcome
        ours = [report for report in reports if report.nodeid.partition("[")[0] == self.nodeid]
        telling = [report for report in ours if not report.passed or report.when == "call"]
        if not telling:
            pytest.fail(f"ComfyUI's process ended before this test did:\n{printed[-5000:]}", pytrace=False)
        self.report = min(telling, key=lambda report: report.passed)


def pytest_runtest_makereport(item, call):
    if call.when == "call" and call.excinfo is None:
        report = item.report
        if report.nodeid != item.nodeid:  # of one of its cases; whoever counts reports knows the item alone
            report.sections.append(("case", report.nodeid))
            report.nodeid = item.nodeid
        return report
