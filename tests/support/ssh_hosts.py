"""Hosts for ssh: an sshd with keys of its own on several loop-back addresses of this machine."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.support.daemons import end_daemons
from tests.support.ports import free_port

ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
RUN_DIRECTORY = Path("/run/sshd")  # needed by sshd; its own service creates it
SERVER = """\
{listen}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
"""
CLIENT = """\
Host *
    Port {port}
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking no
    LogLevel ERROR
"""


def missing_programs() -> str:
    """Return why such hosts are impossible here, or an empty string."""
    absent = [name for name in ("sshd", "ssh", "ssh-keygen") if not shutil.which(name)]
    if absent:
        return (
            f"{', '.join(absent)} missing: apt-get install --no-install-recommends openssh-server"
            " openssh-client"
        )
    return "" if os.geteuid() == 0 else "an sshd that lets this user in needs root"


class SshHosts:
    """An sshd on each of ``ADDRESSES``; ``options`` are the options an ssh needs to log in.

    Args:
        folder: An empty directory.
    """

    def __init__(self, folder: Path):
        self.folder, self.port, self.made_run_directory = folder, free_port(), False
        for name in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        listen = "\n".join(f"ListenAddress {address}:{self.port}" for address in ADDRESSES)
        (folder / "sshd_config").write_text(SERVER.format(folder=folder, listen=listen))
        (folder / "ssh_config").write_text(CLIENT.format(folder=folder, port=self.port))
        self.options = f"-F {folder}/ssh_config"

    def start(self) -> None:
        """Start sshd and wait until a login succeeds."""
        if not RUN_DIRECTORY.exists():
            RUN_DIRECTORY.mkdir()
            self.made_run_directory = True
        log = self.folder / "sshd.log"
        subprocess.run(
            [shutil.which("sshd"), "-f", self.folder / "sshd_config", "-E", log], check=True
        )
        until = time.monotonic() + 20
        while subprocess.run(
            ["ssh", *self.options.split(), "-o", "BatchMode=yes", ADDRESSES[-1], "true"],
            check=False,
            capture_output=True,
        ).returncode:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """End sshd."""
        end_daemons([self.folder / "sshd.pid"])
        if self.made_run_directory:
            RUN_DIRECTORY.rmdir()
