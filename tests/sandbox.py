"""What a systemd unit forbids, forbidden without systemd: python sandbox.py UNIT FOLDER PROGRAM...

The unit is read with its drop-ins, as systemd reads it; then the program is run without
capabilities, under the same seccomp filters, limits and umask, and can write nowhere but in FOLDER
and to the usual devices (Landlock, for ProtectSystem=strict). ProtectHome is not done: a test's
Python may live in a home.
"""

import ctypes
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

SECTION = dict[str, list[str]]

LIBC = ctypes.CDLL(None, use_errno=True)
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, CLEAR_ALL = 24, 38, 47, 4
ALLOW, ERRNO, EPERM, EAFNOSUPPORT = 0x7FFF0000, 0x00050000, 1, 97
NOT_EQUAL, EQUAL, MASKED_EQUAL = 1, 4, 7
PROT_WRITE, PROT_EXEC, SHM_EXEC = 2, 4, 0o100000
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
MOST_FAMILIES = 46
# linux/landlock.h: everything that changes a file system; reading is not handled, so it stays.
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
CHANGES = WRITE_FILE | TRUNCATE | sum(1 << bit for bit in range(4, 14))
CREATE_RULESET, ADD_RULE, RESTRICT_SELF, PATH_BENEATH = 444, 445, 446, 1
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def read(unit: Path) -> SECTION:
    """[Service] of a unit with its drop-ins: those of its prefix and its own, by file name.

    A list is what was said since the last empty value (systemd.syntax(7)).
    """
    folders = [unit.with_name(f"{unit.name}.d")]
    if "-" in unit.stem:
        folders.append(unit.with_name(f"{unit.stem.rsplit('-', 1)[0]}-.service.d"))
    drop_ins = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    found: SECTION = {}
    for file in [unit, *sorted(drop_ins, key=lambda file: file.name)]:
        section = ""
        for line in file.read_text().splitlines():
            if line.startswith("["):
                section = line
            elif section == "[Service]" and "=" in line and not line.startswith("#"):
                key, value = line.split("=", 1)
                found[key] = [*found.get(key, []), value] if value else [""]
    return found


def last(settings: SECTION, key: str) -> str:
    """What counts where only the last value does."""
    return settings.get(key, [""])[-1]


@cache
def group(name: str) -> frozenset[str]:
    """System calls of a group, as systemd has it."""
    done = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    )
    names = [line.strip() for line in done.stdout.splitlines()[1:]]
    return frozenset().union(
        *(group(n) if n.startswith("@") else {n} for n in names if n and not n.startswith("#"))
    )


def allowed(settings: SECTION) -> frozenset[str]:
    """System calls that the unit's filter lets through; @default always (systemd.exec(5))."""
    found = group("@default")
    for line in settings["SystemCallFilter"]:
        names = line.removeprefix("~").split()
        named = frozenset().union(*(group(n) if n.startswith("@") else {n} for n in names))
        found = found - named if line.startswith("~") else found | named
    return found


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class Filter:
    """A seccomp filter (libseccomp): what it says of each system call but those of its rules."""

    def __init__(self, otherwise: int) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2")
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(otherwise))

    def rule(self, action: int, name: str, *when: tuple[int, int, int, int]) -> None:
        """when: (argument, operator, value or mask, value); nothing where a name is unknown."""
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return
        conditions = (Comparison * len(when))(*when)
        done = self._library.seccomp_rule_add_array(
            self._context, action, number, len(when), conditions
        )
        assert done == 0, (name, done)

    def load(self) -> None:
        """From now on, for this thread and all that comes from it."""
        assert self._library.seccomp_load(self._context) == 0


def filters(settings: SECTION) -> list[Filter]:
    """One for each setting, the one that forbids another filter last; the strictest counts."""
    calls = Filter(ERRNO | EPERM)
    for name in allowed(settings):
        calls.rule(ALLOW, name)
    families = Filter(ALLOW)
    kept = {FAMILIES[name] for name in last(settings, "RestrictAddressFamilies").split()}
    for family in set(range(MOST_FAMILIES)) - kept:
        families.rule(ERRNO | EAFNOSUPPORT, "socket", (0, EQUAL, family, 0))
    found = [families]
    if last(settings, "MemoryDenyWriteExecute") == "yes":
        memory, both = Filter(ALLOW), PROT_WRITE | PROT_EXEC
        memory.rule(ERRNO | EPERM, "mmap", (2, MASKED_EQUAL, both, both))
        for name in ("mprotect", "pkey_mprotect"):
            memory.rule(ERRNO | EPERM, name, (2, MASKED_EQUAL, PROT_EXEC, PROT_EXEC))
        memory.rule(ERRNO | EPERM, "shmat", (2, MASKED_EQUAL, SHM_EXEC, SHM_EXEC))
        found.append(memory)
    return [*found, calls]


def protect(folder: Path) -> None:
    """Landlock: changes only below the folder, and to devices that everybody may use."""
    handled = ctypes.c_uint64(CHANGES)
    ruleset = LIBC.syscall(CREATE_RULESET, ctypes.byref(handled), 8, 0)
    assert ruleset >= 0, os.strerror(ctypes.get_errno())
    writable = [(folder, CHANGES), (Path("/dev/shm"), CHANGES)]
    writable += [(Path("/dev") / name, WRITE_FILE | TRUNCATE) for name in DEVICES]
    for path, access in writable:
        descriptor = os.open(path, os.O_PATH)
        beneath = access.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
        assert LIBC.syscall(ADD_RULE, ruleset, PATH_BENEATH, beneath, 0) == 0, path
        os.close(descriptor)
    assert LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert LIBC.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)


def drop_capabilities() -> None:
    """None of them after the next exec, also for root."""
    number = 0
    while LIBC.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    LIBC.prctl(PR_CAP_AMBIENT, CLEAR_ALL, 0, 0, 0)


def main() -> None:
    """Become the program."""
    unit, folder, *program = sys.argv[1:]
    settings = read(Path(unit))
    made = filters(settings)  # reads and runs programs, which is forbidden below
    if last(settings, "CapabilityBoundingSet") == "":
        drop_capabilities()
    if last(settings, "ProtectSystem") == "strict":
        protect(Path(folder))
    os.umask(int(last(settings, "UMask"), 8))
    files, core = (int(last(settings, f"Limit{name}")) for name in ("NOFILE", "CORE"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    resource.setrlimit(resource.RLIMIT_CORE, (core, core))
    os.environ["TMPDIR"] = folder
    for one in made:
        one.load()
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
