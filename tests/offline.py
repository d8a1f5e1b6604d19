"""Code that is run where every attempt to reach the network is noted and refused."""

import subprocess
import sys

REFUSING = """
import socket, sys
asked = []
def refuse(*arguments, **named):
    asked.append(arguments)
    raise OSError("it wants to go out")
socket.socket.connect = socket.getaddrinfo = refuse
"""
SILENT = """
assert sys.modules["openvino_telemetry"] is None
assert asked == []
"""


def run_silently(code: str) -> "subprocess.CompletedProcess[str]":
    """Run it in a process of its own; its exit status is not 0 where it tried."""
    return subprocess.run(
        [sys.executable, "-c", REFUSING + code + SILENT],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
