"""Where machines' control groups go and what is written into them, on directories that look like cgroup mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nagaya import host
from nagaya.host import CgroupPlaces, Limits

LIMITS = Limits(cpu_weight=200, cpu_percent=150, memory_mib=192)


def v1(tmp_path: Path, *controllers: str) -> tuple[str, str]:
    mounts, own = [], []
    for number, controller in enumerate(controllers, 1):
        (tmp_path / controller / "service").mkdir(parents=True)
        point = tmp_path / controller
        mounts.append(f"3{number} 30 0:3{number} / {point} rw,relatime - cgroup cgroup rw,{controller}")
        own.append(f"{number}:{controller}:/service")
    return "\n".join(mounts), "\n".join(own)


def v2(tmp_path: Path, own: str, enabled: dict[str, str]) -> tuple[str, str]:
    top = tmp_path / "unified"
    for group in (Path(own), *Path(own).parents):
        directory = top / group.relative_to("/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").touch()
        (directory / "cgroup.subtree_control").write_text(enabled.get(str(group), ""))
        (directory / "cgroup.controllers").write_text("cpuset cpu io memory pids")
    return f"25 24 0:22 / {top} rw - cgroup2 cgroup2 rw", f"0::{own}"


def nobody_delegates(_: Path) -> bool:
    return False


def test_v1_groups_lie_where_a_server_started_elsewhere_finds_them(tmp_path: Path) -> None:
    mountinfo, own = v1(tmp_path, "cpu", "memory", "pids")
    places = host.cgroup_places(mountinfo, own)
    assert places == CgroupPlaces("v1", {name: tmp_path / name for name in ("cpu", "memory", "pids")})
    assert host.cgroup_places(mountinfo, own.replace("/service", "/")) == places


def test_v1_falls_back_to_the_server_s_own_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = v1(tmp_path, "cpu")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "cpu" and allowed(path, mode))
    places = host.cgroup_places(*texts)
    assert places is not None
    assert places.places == {"cpu": tmp_path / "cpu/service"}


def test_a_missing_controller_is_named_with_the_reason(tmp_path: Path) -> None:
    places = host.cgroup_places(*v1(tmp_path, "cpu"))
    assert places is not None
    assert places.missing.startswith("memory, pids: ")


def test_v1_in_a_container_that_shows_only_its_own_part(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    where = {"cpu": (tmp_path / "cpu", tmp_path / "cpu")}
    mountinfo = f"31 30 0:31 /docker/abc {tmp_path}/cpu rw - cgroup cgroup rw,cpu,cpuacct"
    assert host.cgroup_mounts(mountinfo, "1:cpu,cpuacct:/docker/abc") == (where, None)
    assert host.cgroup_mounts(mountinfo, "1:cpu,cpuacct:/elsewhere") == (where, None)


def test_v2_takes_the_group_whose_children_have_the_most_controllers(tmp_path: Path) -> None:
    texts = v2(tmp_path, "/user.slice/session", {"/user.slice": "memory pids", "/": "cpu memory pids io"})
    places = host.cgroup_places(*texts, delegated=nobody_delegates)
    assert places == CgroupPlaces("v2", dict.fromkeys(("cpu", "memory", "pids"), tmp_path / "unified"))


def test_v2_prefers_the_nearest_of_equals(tmp_path: Path) -> None:
    texts = v2(tmp_path, "/a/b", {"/a": "cpu memory pids", "/": "cpu memory pids"})
    places = host.cgroup_places(*texts, delegated=nobody_delegates)
    assert places is not None
    assert set(places.places.values()) == {tmp_path / "unified/a"}


def test_v2_without_controllers_says_so(tmp_path: Path) -> None:
    places = host.cgroup_places(*v2(tmp_path, "/a", {}), delegated=nobody_delegates)
    assert places is not None
    assert places.places == {}
    assert places.missing == "cpu, memory, pids: is not enabled for children of any group it may write to"


def test_v2_in_a_delegated_group_moves_the_server_into_a_leaf(tmp_path: Path) -> None:
    texts = v2(tmp_path, "/system.slice/nagaya.service", {"/": "cpu memory pids"})
    group = tmp_path / "unified/system.slice/nagaya.service"
    (group / "cgroup.procs").write_text("4711\n")
    places = host.cgroup_places(*texts, delegated=lambda directory: directory == group)
    assert places == CgroupPlaces("v2", dict.fromkeys(("cpu", "memory", "pids"), group))
    (made,) = host.create_cgroups("house", "m1", LIMITS, places)
    assert made == str(group / "nagaya/house/m1")
    assert (group / "nagaya-server/cgroup.procs").read_text() == "4711"
    for enabled in (group, group / "nagaya", group / "nagaya/house"):
        assert (enabled / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_no_cgroup_file_system_means_no_limits() -> None:
    assert host.cgroup_places("20 1 0:20 / / rw - ext4 /dev/vda rw", "") is None


def test_limits_on_v1(tmp_path: Path) -> None:
    places = host.cgroup_places(*v1(tmp_path, "cpu", "memory", "pids"))
    groups = host.create_cgroups("house", "m1", LIMITS, places)
    below = "nagaya/house/m1"
    assert groups == tuple(str(tmp_path / name / below) for name in ("cpu", "memory", "pids"))
    assert (tmp_path / "cpu" / below / "cpu.shares").read_text() == "2048"
    assert (tmp_path / "cpu" / below / "cpu.cfs_quota_us").read_text() == "150000"
    assert (tmp_path / "memory" / below / "memory.limit_in_bytes").read_text() == str((192 + 64) << 20)
    assert (tmp_path / "pids" / below / "pids.max").read_text() == "1024"


def test_limits_on_v2() -> None:
    assert LIMITS.settings("v2", "cpu") == {"cpu.weight": "200", "cpu.max": "150000 100000"}
    assert LIMITS.settings("v2", "memory") == {"memory.max": str((192 + 64) << 20)}


@pytest.mark.parametrize(("weight", "shares"), [(1, "10"), (100, "1024"), (10000, "102400")])
def test_weights_keep_their_ratio_on_v1(weight: int, shares: str) -> None:
    assert Limits(weight, 100, 100).settings("v1", "cpu")["cpu.shares"] == shares


def test_existing_groups_are_left_alone(tmp_path: Path) -> None:
    texts = v2(tmp_path, "/a", {"/": "cpu memory pids"})
    before = {path: path.read_text() for path in (tmp_path / "unified").rglob("*") if path.is_file()}
    places = host.cgroup_places(*texts, delegated=nobody_delegates)
    host.create_cgroups("house", "m1", LIMITS, places)
    assert {path: path.read_text() for path in before} == before


def test_making_groups_again_changes_limits_and_nothing_else(tmp_path: Path) -> None:
    places = host.cgroup_places(*v1(tmp_path, "pids"))
    first = host.create_cgroups("house", "m1", LIMITS, places)
    assert host.create_cgroups("house", "m1", Limits(100, 100, 100, tasks=7), places) == first
    assert (Path(first[0]) / "pids.max").read_text() == "7"


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_a_name_cannot_leave_the_subtree(tmp_path: Path, name: str) -> None:
    places = CgroupPlaces("v1", {"cpu": tmp_path})
    with pytest.raises(ValueError, match="cannot name"):
        host.create_cgroups("house", name, LIMITS, places)


def test_groups_are_listed_and_removed_with_all_that_was_made(tmp_path: Path) -> None:
    places = CgroupPlaces("v1", {"cpuset": tmp_path})  # a controller without settings: its groups are bare directories
    host.create_cgroups("house", "m1", LIMITS, places)
    host.create_cgroups("house", "m2", LIMITS, places)
    assert host.list_cgroups("house", places) == ("m1", "m2")
    host.remove_cgroups("house", "m1", places)
    assert host.list_cgroups("house", places) == ("m2",)
    host.remove_cgroups("house", "m2", places)
    host.remove_cgroups("house", "m2", places)
    assert list(tmp_path.iterdir()) == []


def test_a_group_in_use_is_not_removed(tmp_path: Path) -> None:
    places = CgroupPlaces("v1", {"cpuset": tmp_path})
    (group,) = host.create_cgroups("house", "m1", LIMITS, places)
    (Path(group) / "cgroup.procs").write_text("4711\n")
    with pytest.raises(host.LimitsRefused, match="4711"):
        host.remove_cgroups("house", "m1", places)
