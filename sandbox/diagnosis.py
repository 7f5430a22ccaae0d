"""Remedies for a machine that refuses a tier: the reason is looked up, never guessed from a version."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_IN_CONTAINER = ("/.dockerenv", "/run/.containerenv")


def remedy(tier: str, error: str) -> str:
    """Return what would make the tier available here, given the error of its worker; one line per cause found."""
    found = [line for cause in (_library, _interpreter) for line in cause(error)]
    if tier == "namespaces":
        found += _namespaces(error)
    if tier == "landlock":
        found += _landlock(error)
    return "\n        ".join(found or ["run as a normal user, or as the host's root, on Linux 5.14 or newer"])


def _library(error: str) -> list[str]:
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return ["install libseccomp2 (Debian, Ubuntu) or libseccomp (Fedora, Alpine): it filters system calls"]
    return []


def _interpreter(error: str) -> list[str]:
    if "ImportError" in error or "ModuleNotFoundError" in error:
        return ["name in preload also the packages that a preloaded package imports itself"]
    return []


def _namespaces(error: str) -> list[str]:
    found = []
    if _number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1 and os.geteuid() != 0:
        found.append(
            "Ubuntu restricts user namespaces: an administrator allows them with "
            "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`, or with an AppArmor profile for this "
            "interpreter that has the line `userns,`"
        )
    if _number("/proc/sys/kernel/unprivileged_userns_clone") == 0 and os.geteuid() != 0:
        found.append("an administrator allows user namespaces with `sysctl kernel.unprivileged_userns_clone=1`")
    if _number("/proc/sys/user/max_user_namespaces") == 0:
        found.append("an administrator allows user namespaces with `sysctl user.max_user_namespaces=10000`")
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        found.append(
            "Kubernetes: `hostUsers: false`, `procMount: Unmasked` and a Localhost seccomp profile that allows clone, "
            "unshare, mount, pivot_root and setns give a pod namespaces of its own"
        )
    elif any(map(os.path.exists, _IN_CONTAINER)) or _is_filtered():
        found.append(
            "a container's default seccomp profile refuses namespaces: start it with Podman, or with Docker and "
            "`--security-opt seccomp=PROFILE` where PROFILE allows clone, unshare, mount, pivot_root and setns "
            "(and `--security-opt systempaths=unconfined` for a /proc in the jail)"
        )
    return found


def _landlock(error: str) -> list[str]:
    modules = _text("/sys/kernel/security/lsm")
    if "Landlock" in error or "landlock" in error:
        listed = f" (this machine's is lsm={modules})" if modules else ""
        return [
            f"Landlock is built into Linux 5.13 and newer and must be in the boot parameter lsm=...{listed}: add "
            "`landlock` to it; in gVisor there is none"
        ]
    return []


def _is_filtered() -> bool:
    return any(line.split() == ["Seccomp:", "2"] for line in _text("/proc/self/status").splitlines())


def _number(path: str) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
