"""An S3 server on loopback in a process of its own, and a proxy before it that makes trouble."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def s3_server():
    """Yields the URL of an empty server."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
                break
            assert process.poll() is None, "moto's server did not start"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def upload(url: str, tree: Path, target: str) -> None:
    """Copies a tree to `bucket/prefix`, with credentials, for everyone to read."""
    import s3fs

    fs = s3fs.S3FileSystem(key="a", secret="b", endpoint_url=url, skip_instance_cache=True)
    bucket = target.split("/")[0]
    if not fs.exists(bucket):
        fs.mkdir(bucket)
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{target}/{path.relative_to(tree).as_posix()}", path.read_bytes(), ACL="public-read")


class FaultyProxy:
    """Hands connections on to a server. Notes what clients ask; breaks the answer to every `reset_every`th GET off with a
    reset after `reset_after` bytes (in turn: in its headers, in its middle), and passes no more than `slow` bytes of an answer at a time, with a pause of 1 ms.
    """

    def __init__(
        self, url: str, reset_every: int = 0, reset_after: tuple[int, ...] = (200, 100_000), slow: int = 65536
    ):
        self.server = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.reset_every, self.reset_after, self.slow = reset_every, reset_after, slow
        self.requests = b""
        self.resets = self.gets = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket):
        # How many bytes of the present answer may pass; no limit at first.
        left = [None]
        with contextlib.suppress(OSError), client, socket.create_connection(self.server) as server:
            threading.Thread(target=self._ask, args=(client, server, left), daemon=True).start()
            while data := server.recv(self.slow):
                time.sleep(0.001)
                if left[0] is not None:
                    client.sendall(data[: left[0]])
                    left[0] -= len(data)
                    if left[0] < 0:
                        self.resets += 1
                        client.shutdown(socket.SHUT_RD)  # lets go of the other thread, or nothing is sent
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                else:
                    client.sendall(data)

    def _ask(self, client: socket.socket, server: socket.socket, left: list):
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                with self._lock:
                    self.requests += data
                    self.gets += data.startswith(b"GET ")
                    turn = self.reset_every and data.startswith(b"GET ") and self.gets % self.reset_every == 0
                left[0] = self.reset_after[self.gets % len(self.reset_after)] if turn else None
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)


# What keeps the credentials of the machine out of a test.
NO_CREDENTIALS = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_DEFAULT_REGION": "us-east-1",
}
