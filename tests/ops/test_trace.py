"""torch.compile makes one graph of every op, forward and backward, whatever changes between calls; see trace_all.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_op_is_one_graph(request):
    # a process of its own: this one's kernels are interpreted, which is nothing for a graph
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("trace_all.py"))]
    command += ["all"] if request.config.getoption("--all") else []
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["problems"] == {}
