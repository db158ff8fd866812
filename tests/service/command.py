"""The command line in the test's own process, which saves ten seconds of imports, and as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from subprocess import CompletedProcess
from unittest.mock import patch

from service.cli.main import main


def polyclip(*arguments: str, **environment: str) -> CompletedProcess[str]:
    """The entry point, called as the console script calls it; what it does not tell in one line is raised."""
    command = ["polyclip", *arguments]
    out, err = StringIO(), StringIO()
    before = os.umask(0o077)
    variables = patch.dict(os.environ, {"COLUMNS": "200", "POLYCLIP_THREADS": "1", **environment})
    try:
        with variables, patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return CompletedProcess(command, int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        os.umask(before)
    raise AssertionError("a command ends by SystemExit")


def process(*arguments: str, **environment: str) -> CompletedProcess[str]:
    """`python -m service.cli`."""
    command = [sys.executable, "-m", "service.cli", *arguments]
    variables = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
