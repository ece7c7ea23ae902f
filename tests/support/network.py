"""A process without a network, and a search for what must not be written down."""

import base64
import contextlib
import ctypes
import fcntl
import socket
import struct
import subprocess
from pathlib import Path

NEWNET, NEWUSER = 0x40000000, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)


def cut_off():
    """Put this process into a network namespace of its own, which has nothing but the loopback interface."""
    if libc.unshare(NEWNET) and libc.unshare(NEWNET | NEWUSER):
        raise OSError(ctypes.get_errno(), "no network namespace can be made")
    start_loopback()


def start_loopback():
    """Make the addresses of this machine work in a new network namespace."""
    with socket.socket() as any_socket:
        up = struct.pack("16sh", b"lo", 1)  # SIOCSIFFLAGS with IFF_UP
        fcntl.ioctl(any_socket, 0x8914, up)


@contextlib.contextmanager
def offline():
    """Do the same for a while; what is started meanwhile stays there. Where only root may do it, nothing changes."""
    with open("/proc/thread-self/ns/net") as before:
        alone = libc.unshare(NEWNET) == 0
        try:
            if alone:
                start_loopback()
            yield
        finally:
            if alone:
                libc.setns(before.fileno(), NEWNET)


def can_cut_off():
    """Tell whether this system allows that."""
    try:
        subprocess.run(["true"], preexec_fn=cut_off, check=True)
    except (subprocess.SubprocessError, AttributeError):
        return False
    return True


def found_in(folder, secret):
    """Return the files below a folder that hold a secret, as it is or in base64."""
    forms = [secret.encode(), base64.b64encode(secret.encode()), base64.b64encode(f"api:{secret}".encode())]
    return [
        path for path in Path(folder).rglob("*") if path.is_file() and any(form in path.read_bytes() for form in forms)
    ]


def has(path, marker):
    """Tell whether a file, such as /proc/PID/environ, holds a marker."""
    try:
        return marker.encode() in path.read_bytes()
    except OSError:  # the process has ended
        return False
