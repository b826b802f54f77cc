"""A real S3 server on loopback (rclone's), over a folder: started, killed and started again on the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

RCLONE = Path(sysconfig.get_path("scripts")) / "rclone"
KEY, SECRET = "loopback", "loopback-secret"
BUCKET = "bucket"


class S3Server:
    """Serves the folders of `folder` as buckets; one named BUCKET is made.

    Attributes:
        folder: where the objects lie.
        environment: what botocore and s3fs read to come here.
    """

    def __init__(self, folder: Path) -> None:
        (folder / BUCKET).mkdir(parents=True)
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port: int = one.getsockname()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, prefix: str) -> str:
        """Of a prefix of the bucket."""
        return f"s3://{BUCKET}/{prefix}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        address, keys = f"127.0.0.1:{self.port}", f"{KEY},{SECRET}"
        command = [str(RCLONE), "serve", "s3", "--addr", address, "--auth-key", keys]
        command += ["--config", os.devnull, str(self.folder)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"rclone serve s3 did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill it, in the middle of whatever it does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def served(folder: Path) -> Iterator[S3Server]:
    """A running server, and its environment in this process; both are gone afterwards."""
    server = S3Server(folder)
    server.start()
    try:
        with changed_environment(server.environment):
            yield server
    finally:
        server.kill()


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that are set meanwhile; a module-scoped monkeypatch."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
