"""What this machine lacks for building C++ code, in words. Standard library only: it runs before anything is installed.

DeepSpeed compiles a small communication op at its first start on CPU ranks, and Triton compiles a launcher on a GPU.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

# what to type on Debian and Ubuntu; the words say it for every other system
REMEDY = "install them (Debian, Ubuntu: apt-get install -y g++ python3-dev; ninja comes from pip)"


def missing_build_tools() -> list[str]:
    """The names of what is missing out of a C++ compiler, Python's headers and ninja."""
    missing = []
    if not shutil.which(os.environ.get("CXX", "c++")):
        missing.append("C++ compiler")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        missing.append("Python headers (Python.h)")
    if not shutil.which("ninja"):
        missing.append("ninja")
    return missing
