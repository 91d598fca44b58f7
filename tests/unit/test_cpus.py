"""The CPUs that a process may really use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cpus import cgroup_quota, usable_cpus
from tests.support.processes import ROOT


def quota(tmp_path: Path, membership: str, **files: str) -> float | None:
    """The quota with these files under the cgroup mount; ``__`` in a name is a slash."""
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, content in files.items():
        file = root / name.replace("__", "/").replace("cpu_", "cpu.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    (tmp_path / "self").write_text(membership)
    return cgroup_quota(root, tmp_path / "self")


def test_v2_reads_the_own_group(tmp_path: Path) -> None:
    """Quota over period, in CPUs."""
    assert quota(tmp_path, "0::/pod/app\n", pod__app__cpu_max="150000 100000") == 1.5


def test_v2_takes_the_smallest_on_the_way_to_the_root(tmp_path: Path) -> None:
    """A parent may be stricter than the group itself; a group beside it does not count."""
    files = {
        "pod__app__cpu_max": "400000 100000",
        "pod__cpu_max": "50000 25000",
        "other__cpu_max": "10000 100000",
    }
    assert quota(tmp_path, "0::/pod/app\n", **files) == 2


def test_v2_max_is_no_limit(tmp_path: Path) -> None:
    """`max` in every group means none; a number in one of them counts."""
    assert quota(tmp_path, "0::/pod\n", pod__cpu_max="max 100000", cpu_max="max 100000") is None
    (tmp_path / "cgroup/cpu.max").write_text("300000 100000\n")
    assert cgroup_quota(tmp_path / "cgroup", tmp_path / "self") == 3


def test_v2_in_a_container_that_sees_only_its_own_root(tmp_path: Path) -> None:
    """The path may be the host's and not exist here; the mount's root then has the limit."""
    assert quota(tmp_path, "0::/kubepods/pod1/abc\n", cpu_max="100000 100000") == 1


def test_v1_reads_the_cpu_controller(tmp_path: Path) -> None:
    """Only the line with `cpu` counts, whatever shares its mount; -1 is no limit."""
    membership = "5:cpuset:/set\n4:cpu,cpuacct:/pod/app\n1:name=systemd:/x\n"
    files = {
        "cpu__pod__app__cpu_cfs_quota_us": "250000",
        "cpu__pod__app__cpu_cfs_period_us": "100000",
        "cpu__pod__cpu_cfs_quota_us": "-1",
        "cpu__pod__cpu_cfs_period_us": "100000",
        "cpu__set__cpu_cfs_quota_us": "10000",
        "cpu__set__cpu_cfs_period_us": "100000",
    }
    assert quota(tmp_path, membership, **files) == 2.5


@pytest.mark.parametrize("membership", ["0::/pod\n", "3:cpu:/pod\n", ""])
def test_no_files_are_no_limit(tmp_path: Path, membership: str) -> None:
    """Without a cgroup file system, or with files that say nothing."""
    assert quota(tmp_path, membership, pod__cpu_max="") is None


def test_no_membership_is_no_limit(tmp_path: Path) -> None:
    """Where there is no /proc/self/cgroup at all."""
    assert cgroup_quota(tmp_path, tmp_path / "absent") is None


def test_a_process_confined_to_one_cpu_uses_one() -> None:
    """The affinity mask counts, not what the machine has."""
    cpu = min(os.sched_getaffinity(0))
    code = (
        "import os; from shared.cpus import usable_cpus\n"
        f"before = usable_cpus(); os.sched_setaffinity(0, {{{cpu}}}); print(before, usable_cpus())"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert child.stdout.split() == [str(usable_cpus()), "1"]
