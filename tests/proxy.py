"""A forward proxy with CONNECT for tests, in a thread, or as a process that prints each asked address:

python tests/proxy.py HOST:PORT
"""

import contextlib
import socket
import socketserver
import sys
import threading


class Proxy(socketserver.ThreadingTCPServer):
    """A proxy with CONNECT. `asked` has the addresses for which it was asked; `answer` refuses all of them."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, address=("127.0.0.1", 0), answer=None):
        self.asked, self.answer = [], answer
        super().__init__(address, Tunnel)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Tunnel(socketserver.BaseRequestHandler):
    def handle(self):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            if not (byte := self.request.recv(1)):
                return
            head += byte
        method, address, _ = head.split(b" ", 2)
        assert method == b"CONNECT"
        self.server.asked.append(address.decode())
        if self.server.answer is not None:
            self.request.sendall(f"HTTP/1.1 {self.server.answer}\r\n\r\n".encode())
            return
        host, _, port = address.decode().rpartition(":")
        try:
            other = socket.create_connection((host, int(port)))
        except OSError:
            self.request.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        with other:
            self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pump, args=(other, self.request), daemon=True)
            back.start()
            pump(self.request, other)
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)
            back.join()  # a socket that is closed while a thread reads it gives its number to another connection


def pump(one, other):
    """Pass bytes on until one side ends."""
    try:
        while data := one.recv(1 << 16):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class Printed(list):
    """Addresses, each printed when it is added."""

    def append(self, address):
        super().append(address)
        print(address, flush=True)


if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    with Proxy((host, int(port))) as proxy:
        proxy.asked = Printed()
        threading.Event().wait()
