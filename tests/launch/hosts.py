"""Two hosts on one machine: each has its own network, name, processes, and an sshd; a cable lies between them.

They are made of Linux namespaces without names. A host lives as long as its first process, and that one ends when the
pipe to whoever made it closes: whatever happens to pytest, no process, link or mount stays. Files are shared, as on a
cluster with one file system, but for /run, /dev/shm and ssh's configuration.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child")
# tools for the administrator lie where a user's PATH does not look
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
# addresses that are routed nowhere; only the two hosts see them
ADDRESSES = {"alpha": "198.18.0.1", "beta": "198.18.0.2"}

# the host's first process: says which process it is outside, furnishes the host, and waits
FIRST = """
set -e
read -r outside _ < /proc/self/stat
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
echo {name} > /proc/sys/kernel/hostname
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
{sshd} -f {folder}/sshd_config -E {folder}/sshd-{name}.log
echo $outside
read -r _ || exit 0
"""

# ClientAlive: a session whose launcher is out of reach ends by itself
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
ClientAliveInterval 5
ClientAliveCountMax 2
SetEnv HF_HUB_OFFLINE=1{more_env}
"""

SSH_CONFIG = """
Host *
IdentityFile {folder}/user_key
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
"""


def lacking(tools: Sequence[str], packages: str) -> str | None:
    """Which of the tools this machine has not, in one line that says what to install; None where it has all."""
    absent = [tool for tool in tools if not shutil.which(tool, path=PATH)]
    return f"needs {', '.join(absent)} (Debian, Ubuntu: apt-get install -y {packages})" if absent else None


def missing() -> str | None:
    """Why this machine can't make two hosts, in one line; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    tools = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "sshd", "pdsh")
    if reason := lacking(tools, "iproute2 openssh-server pdsh"):
        return reason
    trial = "mount -t tmpfs tmpfs /run && ip link add cable type veth peer name other"
    tried = subprocess.run(["unshare", *NAMESPACES, "sh", "-c", trial], capture_output=True, text=True, env=_env())
    return f"needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Host:
    """One of the two, once it runs."""

    name: str
    outside: int  # its first process, as the machine knows it

    def inside(self, command: Sequence[str | Path], cwd: Path = Path("/")) -> list[str | Path]:
        """The command that runs `command` on this host."""
        return ["nsenter", f"--target={self.outside}", "--all", "env", f"--chdir={cwd}", *command]

    def run(self, *command: str | Path, **env: str) -> str:
        """Run it to its end as the administrator, and return what it said."""
        done = subprocess.run(self.inside(command), stdout=subprocess.PIPE, text=True, env=_env(**env), timeout=300)
        assert done.returncode == 0, f"{command} ended with status {done.returncode}"
        return done.stdout

    def processes(self) -> list[str]:
        """The command lines of what runs here, but for the host's first process and its sshd."""
        here, found = os.readlink(f"/proc/{self.outside}/ns/pid"), []
        for entry in Path("/proc").glob("[0-9]*"):
            # one that ends meanwhile has no files; one that has ended, and waits to be collected, has no command line
            with suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                belongs = os.readlink(entry / "ns/pid") == here and entry.name != str(self.outside)
                if belongs and line and "[listener]" not in line:
                    found.append(line)
        return found

    def wait_until_idle(self, seconds: float) -> list[str]:
        """Wait until nothing runs here any more; what still does when the time is up."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other by name through ssh, as root, with keys that are made for them in `folder`."""
    _write_configuration(folder)
    firsts: list[subprocess.Popen[str]] = []
    try:
        for name in ADDRESSES:
            script = FIRST.format(name=name, folder=folder, sshd=shutil.which("sshd", path=PATH))
            command, pipe = ["unshare", *NAMESPACES, "sh", "-c", script], subprocess.PIPE
            firsts.append(
                subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=_env(), start_new_session=True)
            )
        ids = [first.stdout.readline() for first in firsts]
        assert all(ids), "a host did not start (its reason stands above)"
        alpha, beta = (Host(name, int(outside)) for name, outside in zip(ADDRESSES, ids, strict=True))
        cable = f"ip link add cable netns {alpha.outside} type veth peer name cable netns {beta.outside}"
        subprocess.run(cable.split(), check=True, env=_env())
        for host in (alpha, beta):
            host.run("ip", "addr", "add", f"{ADDRESSES[host.name]}/24", "dev", "cable")
            host.run("ip", "link", "set", "cable", "up")
        yield alpha, beta
    finally:
        for first in firsts:
            first.stdin.close()
        for first in firsts:
            first.wait()
            first.stdout.close()


def _write_configuration(folder: Path) -> None:
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    # where ops are that DeepSpeed has compiled: a host's first rank would do that again
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    more_env = f" TORCH_EXTENSIONS_DIR={extensions}" if extensions else ""
    files = {
        "hosts": "".join(f"{address} {name}\n" for name, address in [("localhost", "127.0.0.1"), *ADDRESSES.items()]),
        "known_hosts": f"{','.join(ADDRESSES)} {(folder / 'host_key.pub').read_text()}",
        "sshd_config": SSHD_CONFIG.format(folder=folder, more_env=more_env),
        "ssh_config": SSH_CONFIG.format(folder=folder),
    }
    for name, text in files.items():
        (folder / name).write_text(text)


def _env(**more: str) -> dict[str, str]:
    return {**os.environ, "PATH": PATH, **more}
