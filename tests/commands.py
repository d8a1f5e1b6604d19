"""Many commands in one process: each of them spends most of its time on being started."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = """
import json, sys
from dicomai import cli
for arguments in json.load(sys.stdin):
    sys.argv = ["dicomai", *arguments]
    print(">>>", *arguments, flush=True)
    try:
        cli.main()
    except SystemExit as end:
        print("<<<", end.code or 0, flush=True)
"""


def say(config: Path, commands: Sequence[Sequence[str]]) -> bytes:
    """What they print: a line ">>> COMMAND" before, a line "<<< EXIT CODE" after each."""
    lines = [[*arguments, "--config", str(config)] for arguments in commands]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(lines).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
        timeout=200,
    )
    assert done.stdout.count(b"\n<<< ") == len(commands), done.stdout.decode()
    return done.stdout
