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
from experiments.runs import RunError

SCRIPT = Path(__file__).parent / "peer_torch.py"


class Worker:
    """A process of another Python that answers requests; use it in a `with`.

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
                f"--python must be the interpreter of an environment of its own with PyTorch and "
                f"diffusers (pip install torch diffusers), {said}"
            )
        self.python, self.said = found, tempfile.TemporaryFile()  # noqa: SIM115
        # Its own packages: neither this environment's, nor the folder of the script.
        environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [found, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            bufsize=1,
            env=environment | {"PYTHONSAFEPATH": "1"},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # what could not be written to it is still there
            self.process.stdin.close()  # which ends it, unless it is in the midst of something
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.said.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer to a request.

        Raises:
          RunError: the process has ended.
          SideError: it says that it failed.
        """
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RunError(self._why_ended())
        answer = json.loads(line)
        if "error" in answer:
            raise timing.SideError(first_line(answer["error"]))
        return answer

    def _why_ended(self) -> str:
        status = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        if "ModuleNotFoundError" in last:
            return (
                f"--python={self.python} lacks a package ({last}): in that environment, "
                "pip install torch diffusers"
            )
        return f"the process of --python={self.python} ended with status {status}: {last}"


def first_line(text: str) -> str:
    """Returns the start of what an error says."""
    return (text.strip().splitlines() or [""])[0][:200]
