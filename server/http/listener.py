"""The socket that clients connect to."""

import socket

SEND_BYTES = 65_536
"""Kernel send buffer for a client that does not read: about 300 tokens of a stream. The default reaches megabytes."""


def listener(host: str, port: int) -> socket.socket:
    """A listening socket whose connections have bounded buffers; `::` includes IPv4. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # whatever the system's default is
    listening = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # inherited by accepted sockets
    return listening
