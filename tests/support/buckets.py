"""An S3 server on this machine."""

import subprocess
import sys


class Bucket:
    """An S3 server in a process of its own, which can be stopped and started again and forgets nothing over it."""

    SERVER = """
import sys
import tempfile
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
port = server.get_host_and_port()[1]
print(port, flush=True)
for line in sys.stdin:
    if line.strip() == "stop":
        server.stop()
    else:
        server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        server.start()
    print("done", flush=True)
"""

    def __init__(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SERVER], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.address = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def do(self, what: str) -> None:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
