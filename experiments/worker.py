"""Another Python, asked by this one.

What runs there is `experiments.peer_torch`. It waits for requests at its standard input, so it is
idle while this process works.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from experiments import timing

SCRIPT = Path(__file__).parent / "peer_torch.py"


class Worker:
    """A process of another Python that answers requests; use it in a `with`.

    Where it has ended, by the system's hand maybe, the next request starts another.

    Args:
      python: the path of its interpreter, of an environment with PyTorch and diffusers.
      script: what it runs.

    Raises:
      ValueError: there is no such interpreter.
    """

    def __init__(self, python: str | None, script: Path = SCRIPT) -> None:
        found = python and shutil.which(os.path.expanduser(python))
        if not found:
            said = f"got {python!r}" if python else "none was given"
            raise ValueError(
                "--python must be the interpreter of an environment of its own with PyTorch and "
                f"diffusers (pip install torch diffusers), {said}"
            )
        self.python, self.script = found, script
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self._end(self.process)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer to a request.

        Raises:
          SideError: it says that it failed, or the process has ended.
        """
        process = self.process = self.process or self._start()
        line = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            line = process.stdout.readline()
        if not line:
            self.process = None
            raise timing.SideError(self._why_ended(self._end(process)))
        answer = json.loads(line)
        if "error" in answer:
            raise timing.SideError(first_line(answer["error"]))
        return answer

    def _start(self) -> subprocess.Popen[str]:
        # Its own packages: neither this environment's, nor the folder of the script.
        environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        return subprocess.Popen(
            [self.python, str(self.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            bufsize=1,
            env=environment | {"PYTHONSAFEPATH": "1"},
        )

    def _end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Ends a process; returns its status and the last line it said."""
        with contextlib.suppress(BrokenPipeError):  # what could not be written to it is still there
            process.stdin.close()  # which ends it, unless it is in the midst of something
        try:
            status = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        process.stdout.close()
        with self.said as said:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
        return status, lines[-1] if lines else "it said nothing"

    def _why_ended(self, end: tuple[int, str]) -> str:
        status, last = end
        if "ModuleNotFoundError" in last:
            return (
                f"--python={self.python} lacks a package ({last}): in that environment, "
                "pip install torch diffusers"
            )
        return f"the process of --python={self.python} ended with status {status}: {last}"


def first_line(text: str) -> str:
    """Returns the start of what an error says."""
    return (text.strip().splitlines() or [""])[0][:200]
