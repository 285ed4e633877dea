"""Where the repository lies, and Python in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def outside_the_interpreter(*command):
    """Run Python in a process where triton compiles; returns the JSON it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
