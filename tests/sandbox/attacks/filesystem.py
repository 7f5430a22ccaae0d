"""Reading, changing and creating files that are none of the program's business."""

from __future__ import annotations

from attacks.record import REFUSED, Program, probe, steps

WORKED = ("ok: WORKED *",)


def _probe(name: str, action: str, *, works: tuple[str, ...] = (), before: str = "", **more: object) -> Program:
    return Program(name=name, source=probe(action, before), expect=REFUSED, works=works, **more)  # type: ignore[arg-type]


_OVER = 'open(HOST["file"], "r+b", buffering=0)'
PROGRAMS = (
    _probe("read a file", 'os.read(os.open(HOST["file"], 0), 100)', works=("ok: WORKED b'secret*",)),
    _probe("write a file", 'os.write(os.open(HOST["file"], os.O_WRONLY), b"owned")', works=WORKED),
    _probe("append to a file", 'os.write(os.open(HOST["file"], os.O_WRONLY | os.O_APPEND), b"owned")', works=WORKED),
    _probe("truncate a file", 'os.truncate(HOST["file"], 0)', works=WORKED),
    _probe("truncate a file by opening it", 'os.open(HOST["file"], os.O_WRONLY | os.O_TRUNC)', works=WORKED),
    _probe("remove a file", 'os.unlink(HOST["file"])', works=WORKED),
    _probe("rename a file", 'os.rename(HOST["file"], HOST["file"] + ".hostile")', works=WORKED),
    _probe("rename a directory", 'os.rename(HOST["directory"], HOST["directory"] + ".hostile")'),
    _probe("change a file's mode", 'os.chmod(HOST["owned"], 0o777)', works=WORKED),
    _probe("change a file's times", 'os.utime(HOST["file"])', works=WORKED),
    _probe("change a file's owner", 'os.chown(HOST["file"], os.getuid(), -1)'),
    _probe("set an extended attribute", 'os.setxattr(HOST["file"], "user.hostile", b"1")'),
    _probe("list a directory", 'os.listdir(HOST["directory"])', works=WORKED),
    _probe("create a file", 'os.open(HOST["directory"] + "/hostile-new", os.O_CREAT | os.O_WRONLY)', works=WORKED),
    _probe("create a directory", 'os.mkdir(HOST["directory"] + "/hostile-new")', works=WORKED),
    _probe("map a file", '__import__("mmap").mmap(os.open(HOST["file"], 0), 6, prot=1)[:]', works=("ok: WORKED b's*",)),
    _probe("climb out with dots", 'os.read(os.open("../" * 40 + HOST["file"], 0), 100)', works=WORKED),
    _probe("a second name for a file", 'os.link(HOST["owned"], HOST["directory"] + "/hostile-link")', works=WORKED),
    Program(
        name="read through a symbolic link",
        source=steps('os.symlink(HOST["file"], "hostile-link")\nreturn os.read(os.open("hostile-link", 0), 100)'),
        expect=REFUSED,
        works=WORKED,
    ),
    Program(
        name="ask whether a file exists",
        source=probe('os.stat(HOST["file"]).st_size'),
        expect=REFUSED,
        tiers={"landlock": ("ok: WORKED *",)},  # Landlock does not hide names; docs/sandbox.md says so
        works=WORKED,
    ),
    _probe("read the project", 'os.read(os.open(HOST["repository"] + "/pyproject.toml", 0), 100)'),
    _probe("read the shadow file", 'os.read(os.open("/etc/shadow", 0), 100)'),
    _probe("read the user list", 'os.read(os.open("/etc/passwd", 0), 100)', works=WORKED),
    _probe("read the host's name service", 'os.read(os.open("/etc/hosts", 0), 100)', works=WORKED),
    _probe("write into the library", 'os.open(os.path.dirname(os.__file__) + "/hostile.py", os.O_CREAT | os.O_WRONLY)'),
    _probe("replace the interpreter", "os.open(sys.executable, os.O_WRONLY)", before="import sys"),
    _probe(
        "rewrite the sandbox's own code",
        'os.open(sys.modules["coupled_sandbox_codec"].__file__, os.O_WRONLY)',
        before="import sys",
    ),
    _probe("read the sandbox's own code", 'os.open(HOST["repository"] + "/sandbox/worker.py", 0)'),
    _probe("read the judge's environment", "os.read(os.open(f\"/proc/{HOST['judge']}/environ\", 0), 1 << 16)"),
    _probe("read the judge's memory", "os.open(f\"/proc/{HOST['judge']}/mem\", os.O_RDONLY)"),
    _probe("write the judge's memory", "os.open(f\"/proc/{HOST['judge']}/mem\", os.O_RDWR)"),
    _probe("open the judge's descriptors", "os.listdir(f\"/proc/{HOST['judge']}/fd\")"),
    _probe("read a same user's environment", "os.read(os.open(f\"/proc/{HOST['twin']}/environ\", 0), 1 << 16)"),
    _probe("read the parent's memory", 'os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY)'),
    _probe("reach a file by the first process's root", 'os.read(os.open("/proc/1/root" + HOST["file"], 0), 100)'),
    _probe("change a setting of the kernel", 'os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY)'),
    _probe("trigger a system request", 'os.open("/proc/sysrq-trigger", os.O_WRONLY)'),
    _probe("list the devices of the kernel", 'os.listdir("/sys/class")', works=WORKED),
    _probe("open the memory device", 'os.open("/dev/mem", os.O_RDONLY)'),
    _probe("open the kernel's messages", 'os.open("/dev/kmsg", os.O_RDONLY)'),
    _probe("make a device", 'os.mknod("hostile-dev", 0o600 | 0o020000, os.makedev(1, 1))'),
    _probe("change the root", 'os.chroot(".")'),
    _probe("open the terminal", 'os.open("/dev/tty", os.O_RDWR)'),
    Program(
        name="find a descriptor of a directory left open",
        source="""
import os, stat
def f(x):
    found = []
    for fd in range(1024):
        try:
            if not stat.S_ISCHR(os.fstat(fd).st_mode) and fd > 3: found.append(fd)
        except OSError: pass
    return f"found {found}"
""",
        expect=("ok: found []",),
        tiers={"process": ("ok: found []",)},
    ),
)
