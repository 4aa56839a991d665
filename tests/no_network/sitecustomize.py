"""Put this folder on PYTHONPATH and the process cannot open a network connection: it fails loudly instead."""

import socket

_connect = socket.socket.connect


def _refuse(self, address):
    if self.family == getattr(socket, "AF_UNIX", None):
        return _connect(self, address)
    raise RuntimeError(f"a network connection was attempted, to {address}")


socket.socket.connect = _refuse
socket.socket.connect_ex = _refuse
