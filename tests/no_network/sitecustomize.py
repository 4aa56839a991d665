"""Put this folder on PYTHONPATH and the process cannot open a network connection: it fails loudly instead.

The machine itself is not the network: a chapter talks to a server that it has started.
"""

import socket


def _only_here(connect):
    def refuse(self, address):
        if self.family == getattr(socket, "AF_UNIX", None) or address[0] in ("127.0.0.1", "::1"):
            return connect(self, address)
        raise RuntimeError(f"a network connection was attempted, to {address}")

    return refuse


socket.socket.connect = _only_here(socket.socket.connect)
socket.socket.connect_ex = _only_here(socket.socket.connect_ex)
