"""The CPU, and how many CPUs this process may use according to affinity and cgroup quota."""

import os
import platform
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_OF_SELF = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")


def usable_cpus() -> int:
    """The number of CPUs in the affinity mask, limited by the cgroup's quota; at least 1.

    A quota of 1.5 CPUs counts as one: llama.cpp's threads busy-wait for each other, so a thread
    that is throttled slows down all the others.
    """
    allowed = len(own_cpus())
    quota = cgroup_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def own_cpus() -> list[int]:
    """The numbers of the CPUs in the affinity mask."""
    return sorted(os.sched_getaffinity(0))


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The model name of the CPU; on Arm, which has none, the architecture."""
    return _cpuinfo(cpuinfo).get("model name") or platform.machine()


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The CPU's feature flags, as the kernel names them; may be empty."""
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
    """The smallest CPU quota of this process's cgroup and its parents, in CPUs.

    Reads cgroup v2 (``cpu.max``) and v1 (``cpu.cfs_quota_us``); None without a limit.
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
        # In a container the path may be that of the host; then only the mount's root exists.
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
