"""Which CPU this is, and how many this process may really use: what affinity and cgroup allow."""

import os
import platform
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_OF_SELF = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")


def usable_cpus() -> int:
    """CPUs in the affinity mask, cut to the cgroup's quota; at least 1.

    A quota of one and a half CPUs counts as one: llama.cpp's threads wait for each other in a
    loop, so a thread without a CPU of its own slows all the others.
    """
    allowed = len(own_cpus())
    quota = cgroup_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def own_cpus() -> list[int]:
    """The numbers of the CPUs in the affinity mask."""
    return sorted(os.sched_getaffinity(0))


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """What this CPU calls itself; on Arm, which has no name, its architecture."""
    return _cpuinfo(cpuinfo).get("model name") or platform.machine()


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The instruction sets that this CPU has, in the kernel's words; may be empty."""
    fields = _cpuinfo(cpuinfo)
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _cpuinfo(path: Path) -> dict[str, str]:
    """The fields of the first CPU."""
    try:
        first = path.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cgroup_quota(root: Path = CGROUP_ROOT, membership: Path = CGROUP_OF_SELF) -> float | None:
    """The smallest CPU quota on the way from this process's cgroup to the root, in CPUs.

    Reads cgroup v2 (``cpu.max``) and v1 (``cpu.cfs_quota_us``); None where there is no limit.
    """
    quotas = [
        quota
        for folder in _cgroup_folders(root, membership)
        if (quota := _quota_v2(folder) or _quota_v1(folder)) is not None
    ]
    return min(quotas, default=None)


def _cgroup_folders(root: Path, membership: Path) -> list[Path]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        own = base / path.lstrip("/")
        # Inside a container the path may be the host's; then only the mount's root exists.
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(base))]
    return folders or [root]


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return None if quota <= 0 else quota / period
