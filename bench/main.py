"""Speed and size of Nagaya, each beside its yardstick, measured in one run.

    script/bench launch   a machine's start against the same QEMU command line started bare, and against libvirt
    script/bench scale    many machines: memory and processor time of the server, take-over after kill -9, lists
    script/bench cli      how long a command takes

Every run has a server of its own with a fresh directory under /tmp; at the end its machines and its server are ended,
by their own identity, and the directory is removed. Figures are never asserted: they depend on the host.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bare import Bare, CommandLine
from server import Server, rss_mib

Figures = dict[str, Any]


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float]) -> Figures:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "min": round(ordered[0], 1),
        "max": round(ordered[-1], 1),
        "n": len(ordered),
    }


# --- launch ----------------------------------------------------------------------------------------------------


def launch(pairs: int) -> Figures:
    """A machine to guest-ready by the command, by the API, and by bare QEMU, taking turns."""
    with Server() as server:
        say("building the image and proving the accelerator (not counted)")
        server.nagaya("run", "tiny", "pattern", "--wait", "--timeout", "900")
        pattern = server.client.get("/machines/pattern")
        line = CommandLine.of(pattern["pid"])
        ready_line = server.ready_line(pattern)
        server.delete("pattern")

        by_command: list[float] = []
        by_api: list[float] = []
        accepted: list[float] = []
        answered: list[float] = []
        bare_ready: list[float] = []
        bare_qmp: list[float] = []

        def command(name: str) -> None:
            by_command.append(milliseconds(lambda: server.nagaya("run", "tiny", name, "--wait", "--quiet")))
            server.delete(name)

        def api(name: str) -> None:
            began = time.perf_counter()
            server.client.post("/machines", {"image": "tiny", "name": name})
            taken = time.perf_counter()
            seen = server.wait(name, "running")
            running = time.perf_counter()
            if seen["state"] != "running":
                raise SystemExit(f"{name} is {seen['state']}: {seen['error'] or seen['state_detail']}")
            server.wait(name, "ready")
            by_api.append((time.perf_counter() - began) * 1000)
            answered.append((taken - began) * 1000)
            accepted.append((running - taken) * 1000)
            server.delete(name)

        def bare(_: str) -> None:
            with Bare(line, ready_line) as qemu:
                bare_qmp.append(qemu.monitor_ms)
                bare_ready.append(qemu.ready_ms())

        for turn in range(pairs):
            order = [bare, command, api]
            # Whoever goes first finds the caches of the turn before; so the order rotates.
            for position in range(3):
                order[(turn + position) % 3](f"pair{turn}-{position}")
            say(
                f"pair {turn + 1} of {pairs}: command {by_command[-1]:.0f} ms, API {by_api[-1]:.0f} ms "
                f"(accepted to running {accepted[-1]:.0f} ms), bare {bare_ready[-1]:.0f} ms (QMP {bare_qmp[-1]:.0f} ms)"
            )
        figures: Figures = {
            "accelerator": pattern["accelerator"],
            "command_to_ready_ms": spread(by_command),
            "api_to_ready_ms": spread(by_api),
            "bare_to_ready_ms": spread(bare_ready),
            "ratio_command": ratio(by_command, bare_ready),
            "ratio_api": ratio(by_api, bare_ready),
            "api_answer_ms": spread(answered),
            "accepted_to_running_ms": spread(accepted),
            "bare_to_qmp_ms": spread(bare_qmp),
        }
        figures["libvirt"] = libvirt(server, pattern, pairs)
        return figures


def ratio(ours: list[float], theirs: list[float]) -> Figures:
    """Of the medians, and the median of the pairs' own ratios."""
    return {
        "of_medians": round(statistics.median(ours) / statistics.median(theirs), 3),
        "median_of_pairs": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
    }


def libvirt(server: Server, pattern: Figures, runs: int) -> Figures:
    """``virsh start`` of the same kernel and initrd, where libvirt is installed and its daemon answers."""
    if shutil.which("virsh") is None:
        return {"skipped": "libvirt is not installed; apt-get install libvirt-daemon-system libvirt-clients"}
    connect = ["virsh", "--connect", "qemu:///system"]
    probe = subprocess.run([*connect, "version"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return {"skipped": f"libvirt does not answer: {probe.stderr.strip().splitlines()[-1]}"}
    name = f"nagaya-bench-{os.getpid()}"
    image = server.image(pattern)
    manifest = json.loads((image / "manifest.json").read_text())
    kind = "kvm" if pattern["accelerator"] == "kvm" else "qemu"
    # libvirt's QEMU runs as another user, which may not read our directory.
    with tempfile.TemporaryDirectory(prefix="nagaya-bench-libvirt-") as directory:
        os.chmod(directory, 0o755)
        files = {part: Path(directory) / part for part in ("kernel", "initrd")}
        for part, path in files.items():
            shutil.copyfile(image / manifest[part]["name"], path)
            path.chmod(0o644)
        domain = Path(directory) / "domain.xml"
        domain.write_text(
            f"<domain type='{kind}'><name>{name}</name><memory unit='MiB'>{pattern['memory_mib']}</memory>"
            f"<vcpu>{pattern['cpus']}</vcpu><os><type arch='{pattern['architecture']}' machine='q35'>hvm</type>"
            f"<kernel>{files['kernel']}</kernel><initrd>{files['initrd']}</initrd>"
            "<cmdline>console=ttyS0 panic=-1 no_timer_check</cmdline></os>"
            "<features><acpi/></features><devices><console type='pty'/></devices></domain>"
        )
        times: list[float] = []
        subprocess.run([*connect, "define", str(domain)], check=True, capture_output=True)
        try:
            for _ in range(runs):
                times.append(
                    milliseconds(lambda: subprocess.run([*connect, "start", name], check=True, capture_output=True))
                )
                subprocess.run([*connect, "destroy", name], check=True, capture_output=True)
        finally:
            subprocess.run([*connect, "undefine", name], check=True, capture_output=True)
    return {"virsh_start_ms": spread(times)}


# --- scale -----------------------------------------------------------------------------------------------------


def scale(machines: int, stopped: int) -> Figures:
    """Many machines at once, an idle server, a killed server, long lists."""
    figures: Figures = {"machines": machines, "stopped": stopped}
    with Server() as server:
        say("building the image and proving the accelerator (not counted)")
        server.nagaya("run", "tiny", "pattern", "--wait", "--timeout", "900")
        server.delete("pattern")
        say(f"starting {machines} machines at once")
        names = [f"many{number}" for number in range(machines)]
        began = time.perf_counter()
        for name in names:
            server.client.post("/machines", {"image": "tiny", "name": name, "memory_mib": 128})
        figures["accept_all_s"] = round(time.perf_counter() - began, 2)
        seen = [server.wait(name, "ready", timeout_s=900) for name in names]
        figures["all_ready_s"] = round(time.perf_counter() - began, 1)
        figures["ready"] = sum(machine["ready"] for machine in seen)
        say(f"{figures['ready']} of {machines} ready after {figures['all_ready_s']} s; 20 s of idling")
        figures["server_rss_mib"] = rss_mib(server.pid)
        before, at = server.cpu_s(), time.perf_counter()
        time.sleep(20)
        figures["server_idle_cpu_percent"] = round((server.cpu_s() - before) / (time.perf_counter() - at) * 100, 2)
        figures["qemu_rss_mib_median"] = round(statistics.median(rss_mib(machine["pid"]) for machine in seen), 1)
        say("kill -9 of the server, and a new one")
        pids = {machine["name"]: machine["pid"] for machine in seen}
        server.kill()
        began = time.perf_counter()
        server.up()
        figures["server_answers_s"] = round(time.perf_counter() - began, 2)
        found = server.until(
            lambda: [m for m in server.client.pages("/machines", state="running", limit=1000) if m["pid"]],
            lambda found: len(found) == machines,
            60,
        )
        figures["adopted_s"] = round(time.perf_counter() - began, 2)
        figures["adopted"] = len(found)
        figures["same_processes"] = {m["name"]: m["pid"] for m in found} == pids
        say(f"{figures['adopted']} taken over in {figures['adopted_s']} s")
    with Server() as server:
        say(f"{stopped} stopped machines")
        fill(server, stopped)
        server.client.get("/machines", limit=100)
        pages = []
        after = None
        for _ in range(50):
            began = time.perf_counter()
            page = server.client.get("/machines", limit=100, after=after)
            pages.append((time.perf_counter() - began) * 1000)
            after = page["next"]
        figures["page_of_100_ms"] = spread(pages)
        figures["listed"] = sum(1 for _ in server.client.pages("/machines", limit=1000))
        figures["server_rss_mib_with_stopped"] = rss_mib(server.pid)
    return figures


def fill(server: Server, count: int) -> None:
    """Copy one stopped machine's row: a server that had been asked for so many would hold the same rows.

    Asking for them one by one would measure admission, not lists. The server is down while its database is written.
    """
    import sqlite3

    server.nagaya("run", "tiny", "pattern", "--no-start", "--timeout", "900")
    pattern = server.client.get("/machines/pattern")
    server.down()
    with contextlib.closing(sqlite3.connect(server.paths.database)) as database, database:
        cursor = database.execute("SELECT * FROM machines WHERE id = ?", (pattern["id"],))
        row = cursor.fetchone()
        columns = [column[0] for column in cursor.description]
        mac = row[columns.index("mac")]
        marks = ", ".join("?" for _ in columns)

        def copies() -> Iterator[list[Any]]:
            for number in range(count - 1):
                ident = f"{number:08x}-0000-4000-8000-000000000000"
                own = f"52:54:00:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
                swap = {pattern["id"]: ident, mac: own, '"pattern"': f'"copy{number:05}"'}
                values = []
                for column, value in zip(columns, row, strict=True):
                    text = f"copy{number:05}" if column == "name" else value
                    if isinstance(text, str):
                        for old, new in swap.items():
                            text = text.replace(old, new)
                    values.append(text)
                yield values

        database.executemany(f"INSERT INTO machines ({', '.join(columns)}) VALUES ({marks})", copies())
    server.up()


# --- commands --------------------------------------------------------------------------------------------------


def cli(runs: int) -> Figures:
    """How long commands take, beside an interpreter that does nothing."""
    with Server() as server:
        fill(server, 100)

        def times(*words: str) -> Figures:
            return spread([milliseconds(lambda: server.nagaya(*words)) for _ in range(runs)])

        def nothing() -> object:
            return subprocess.run([sys.executable, "-c", "pass"], check=True)

        return {
            "python_ms": spread([milliseconds(nothing) for _ in range(runs)]),
            "version_ms": times("--version"),
            "ls_100_ms": times("ls"),
            "ls_100_json_ms": times("ls", "--output", "json"),
            "show_ms": times("show", "pattern"),
            "help_ms": times("--help"),
        }


# --- the report ------------------------------------------------------------------------------------------------

TARGETS = {
    "launch": (
        ("run --wait against bare QEMU, ratio of medians", "ratio_command.of_medians", "≤ 1.05"),
        ("the same through the API alone", "ratio_api.of_medians", ""),
        ("run --wait to ready, ms", "command_to_ready_ms.median", ""),
        ("API to ready, ms", "api_to_ready_ms.median", ""),
        ("bare QEMU to ready, ms", "bare_to_ready_ms.median", ""),
        ("API accepted to QMP running, ms", "accepted_to_running_ms.median", "≤ 250"),
        ("bare QEMU to QMP running, ms", "bare_to_qmp_ms.median", ""),
        ("virsh start, ms", "libvirt.virsh_start_ms.median", ""),
        ("virsh start", "libvirt.skipped", ""),
    ),
    "scale": (
        ("machines ready", "ready", "all"),
        ("until all were ready, s", "all_ready_s", ""),
        ("server's memory, MiB", "server_rss_mib", "≤ 150"),
        ("server idle, % of one processor", "server_idle_cpu_percent", "≤ 2"),
        ("one QEMU's memory, MiB", "qemu_rss_mib_median", ""),
        ("taken over after kill -9", "adopted", "all"),
        ("by the same processes", "same_processes", "True"),
        ("until all were taken over, s", "adopted_s", "≤ 2"),
        ("a page of 100 of the stopped, ms", "page_of_100_ms.median", "≤ 25"),
        ("server's memory with the stopped, MiB", "server_rss_mib_with_stopped", "≤ 200"),
    ),
    "cli": (
        ("python -c pass, ms", "python_ms.median", ""),
        ("nagaya --version, ms", "version_ms.median", "≤ 150"),
        ("nagaya ls with 100 machines, ms", "ls_100_ms.median", "≤ 350"),
        ("nagaya ls --output json, ms", "ls_100_json_ms.median", ""),
        ("nagaya show, ms", "show_ms.median", ""),
        ("nagaya --help, ms", "help_ms.median", ""),
    ),
}


def report(which: str, figures: Figures) -> None:
    print(f"{'FIGURE':50} {'MEASURED':>12}  TARGET")
    for title, path, target in TARGETS[which]:
        value: Any = figures
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            print(f"{title:50} {value!s:>12}  {target}".rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=["launch", "scale", "cli"])
    parser.add_argument("--output", choices=["table", "json"], default="table")
    parser.add_argument("--pairs", type=int, default=10, help="turns of launch, runs of cli (default 10)")
    parser.add_argument("--machines", type=int, default=20, help="scale: how many run at once")
    parser.add_argument("--stopped", type=int, default=10_000, help="scale: how many are listed")
    arguments = parser.parse_args()
    # Ctrl-C and SIGTERM unwind through the servers' own ends, so that nothing stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.which == "launch":
        figures = launch(arguments.pairs)
    elif arguments.which == "scale":
        figures = scale(arguments.machines, arguments.stopped)
    else:
        figures = cli(arguments.pairs)
    figures["host"] = {"processors": os.cpu_count(), "kernel": platform.release(), "load": os.getloadavg()[0]}
    if arguments.output == "json":
        print(json.dumps(figures, indent=2))
    else:
        report(arguments.which, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
