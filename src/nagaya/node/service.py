"""What one host offers the control plane: composes the engine, the images and the network.

Directories of one machine: ``data/machines/<id>`` (disk, identity, the last launched incarnation) and
``run/machines/<id>`` (what belongs to its processes). A machine has a driver while something runs or is wanted of it;
one that merely rests on disk costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from nagaya import host
from nagaya.errors import NotFound
from nagaya.host import Paths
from nagaya.machine.accelerator import Accelerators
from nagaya.machine.compile import Launch
from nagaya.machine.compile import compile as compile_plan
from nagaya.machine.console import Viewer
from nagaya.machine.driver import Driver, Facts, Prepared
from nagaya.machine.process import Confinement, landlock_abi
from nagaya.model.image import Image
from nagaya.model.machine import Accelerator, Architecture, MachineSpec, NetworkMode, Observation, Wanted
from nagaya.model.network import Network
from nagaya.model.node import (
    Executed,
    Finding,
    Gone,
    NodeFacts,
    Progress,
    Synced,
    memory_budget_mib,
)
from nagaya.network import user as user_network
from nagaya.node import doctor, facts
from nagaya.node.identity import Identities
from nagaya.settings import Settings
from nagaya.storage import qemuimg
from nagaya.storage.images import ImageStore

log = structlog.get_logger(__name__)

Report = Observation | Gone | Synced


class Service:
    """The node, in-process. Implements ``control.nodes.Node`` structurally; see there for what each method promises."""

    def __init__(self, paths: Paths, settings: Settings) -> None:
        self._paths = paths
        self._instance = ""
        self._images = ImageStore(paths.images)
        self._accelerators = Accelerators(
            paths.data / "accelerators.json",
            facts.own_architecture(),
            silence_s=settings.trial.silence_s,
            deadline_s=settings.trial.deadline_s,
            own_uids=os.geteuid() == 0,
        )
        self._identities = Identities(settings.jail.uid_base, settings.jail.uid_count) if os.geteuid() == 0 else None
        self._drivers: dict[str, Driver] = {}
        self._watchers: list[asyncio.Queue[Report]] = []
        self._uids = range(settings.jail.uid_base, settings.jail.uid_base + settings.jail.uid_count)
        self._probing: asyncio.Task[Network] | None = None

    # --- life

    async def start(self) -> None:
        """Take over every machine that runs, or ran, here; all at once."""
        for directory, mode in (
            (self._paths.machines, 0o711),
            (self._paths.machines_runtime, 0o711),
            (self._paths.images, 0o755),
        ):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)
        if self._identities is not None:
            await asyncio.to_thread(self._identities.restore, self._paths.machines)
        self._instance = hashlib.sha256(os.fsencode(self._paths.data.resolve())).hexdigest()[:12]
        # Tried once, beside the rest: the first launch need not wait for it.
        self._probing = asyncio.create_task(user_network.probe(self._uids if self._identities else None))
        known = [entry.name for entry in os.scandir(self._paths.machines_runtime) if entry.is_dir()]
        await asyncio.gather(*(self._driver(machine_id).known() for machine_id in known))

    async def stop(self) -> None:
        """Let go of the machines; they run on."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})
        await asyncio.gather(*(driver.close() for driver in self._drivers.values()))

    def _driver(self, machine_id: str) -> Driver:
        driver = self._drivers.get(machine_id)
        if driver is None:
            driver = Driver(
                machine_id,
                runtime=self._paths.machines_runtime / machine_id,
                data=self._paths.machines / machine_id,
                prepare=lambda spec, avoid: self._prepare(machine_id, spec, avoid),
                report=self._publish,
            )
            self._drivers[machine_id] = driver
            driver.start()
        return driver

    def _publish(self, report: Report) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(report)

    # --- what it has

    @property
    def name(self) -> str:
        return facts.node_name()

    async def facts(self) -> NodeFacts:
        return facts.collect(
            self._paths.data,
            tuple([await self._accelerators.emulator(a) for a in Architecture]),
            self._accelerators.verdicts(),
            host.cgroup_version() or "none",
        )

    async def choose_accelerator(self, architecture: Architecture, demanded: Accelerator | None) -> Accelerator:
        return (await self._accelerators.choose(architecture, demanded, self._trial_image)).accelerator

    def _trial_image(self, architecture: Architecture) -> tuple[Image, Path]:
        return self._images.get("tiny", architecture)

    # --- machines

    async def put(self, wanted: Wanted) -> None:
        if not (self._paths.machines / wanted.id).is_dir():
            # Removed meanwhile, or lost: the control plane knows which.
            self._publish(Gone(wanted.id))
            return
        self._driver(wanted.id).put(wanted)

    async def observe(self) -> AsyncIterator[Report]:
        queue: asyncio.Queue[Report] = asyncio.Queue()
        # Joined before the first report is made, so that no change falls between the list and the stream.
        self._watchers.append(queue)
        try:
            for driver in list(self._drivers.values()):
                yield driver.observation
            yield Synced()
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(queue)

    async def provision(self, machine_id: str, spec: MachineSpec) -> None:
        data = self._paths.machines / machine_id
        data.mkdir(exist_ok=True)
        self._make_runtime(machine_id)
        uid = self._claim(data)
        if uid is not None:
            os.chown(data, 0, uid)
        data.chmod(0o710)
        if spec.disk_mib is not None:
            await qemuimg.create_disk(data / "disk.qcow2", spec.disk_mib, uid=uid, gid=uid)

    def _make_runtime(self, machine_id: str) -> None:
        """Also before a launch: the runtime directories of all machines are gone when the host was restarted."""
        runtime = self._paths.machines_runtime / machine_id
        runtime.mkdir(exist_ok=True)
        runtime.chmod(0o711)

    def _claim(self, data: Path) -> int | None:
        """The machine's own user id, kept in its directory; None when Nagaya is no root."""
        if self._identities is None:
            return None
        kept = self._identity(data)
        uid = self._identities.claim(data, kept)
        if uid != kept:
            host.atomic_write(data / "identity.json", msgspec.json.encode({"uid": uid}))
            os.chown(data, 0, uid)
            disk = data / "disk.qcow2"
            if disk.exists():
                os.chown(disk, uid, uid)
        return uid

    def _identity(self, data: Path) -> int | None:
        """The user id that a machine was given; None when it has none of its own."""
        if self._identities is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            kept: int = msgspec.json.decode((data / "identity.json").read_bytes())["uid"]
            return kept
        return None

    async def _prepare(self, machine_id: str, spec: MachineSpec, avoid: Accelerator | None) -> Prepared:
        """Everything one launch needs; called by the machine's driver."""
        data = self._paths.machines / machine_id
        self._make_runtime(machine_id)
        image, directory = self._images.get(spec.image, spec.architecture)
        verdict = await self._accelerators.choose(spec.architecture, spec.accelerator, self._trial_image, avoid=avoid)
        emulator = await self._accelerators.require(spec.architecture)
        uid = self._claim(data)
        if spec.network is NetworkMode.NONE:
            network = Network("none", "the machine was made without a network")
        else:
            network = await self._find_network()
        launch = Launch(
            machine_id=machine_id,
            emulator=emulator,
            accelerator=verdict.accelerator,
            kernel=str(directory / image.kernel.name),
            initrd=str(directory / image.initrd.name),
            cmdline=image.cmdline,
            disk=str(data / "disk.qcow2") if spec.disk_mib is not None else None,
            network=network,
        )
        budget = memory_budget_mib(spec.memory_mib, verdict.accelerator)
        limits = host.Limits(
            cpu_weight=spec.cpu_weight,
            cpu_percent=spec.cpu_limit_percent or (spec.cpus + 1) * 100,
            memory_mib=budget,
        )
        return Prepared(
            plan=compile_plan(spec, launch),
            confinement=Confinement(uid=uid, gid=uid, cgroups=host.create_cgroups(self._instance, machine_id, limits)),
            facts=Facts(
                accelerator=verdict.accelerator,
                accelerator_reason=verdict.reason,
                network=launch.network.mode,
                network_reason=launch.network.reason,
                ready_line=image.ready_line,
                architecture=spec.architecture,
                agent=image.agent,
            ),
        )

    async def _tried_network(self) -> Network:
        assert self._probing is not None, "the service has not started"
        return await asyncio.shield(self._probing)

    async def _find_network(self) -> Network:
        network = await self._tried_network()
        if network.mode == "passt" and (problem := await user_network.guard(self._uids)) is not None:
            return Network("isolated", f"no outbound network: {problem}")
        return network

    async def remove(self, machine_id: str) -> None:
        data, runtime = self._paths.machines / machine_id, self._paths.machines_runtime / machine_id
        if data.is_dir() or runtime.is_dir():
            await self._driver(machine_id).remove()
            self._drivers.pop(machine_id, None)
        uid = self._identity(data)
        if uid is not None:
            # Whatever a machine left running must not meet the next one with its user id.
            await host.end_processes_of(uid)
        host.remove_cgroups(self._instance, machine_id)
        for directory in (runtime, data):
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(shutil.rmtree, directory)
        if self._identities is not None and uid is not None:
            self._identities.release(data, uid)
            if (await self._tried_network()).mode == "passt":
                # With the last machine of this host; the next launch claims an id first, then puts the table up again.
                await asyncio.to_thread(
                    self._identities.when_unused, lambda: asyncio.run(user_network.remove(self._uids))
                )
        self._publish(Gone(machine_id))

    def _known(self, machine_id: str) -> Driver:
        if machine_id not in self._drivers and not (self._paths.machines / machine_id).is_dir():
            raise NotFound(f"{self.name} has no machine {machine_id}")
        return self._driver(machine_id)

    async def execute(self, machine_id: str, argv: Sequence[str], stdin: bytes | None, timeout_s: float) -> Executed:
        return await self._known(machine_id).execute(argv, stdin, timeout_s)

    def console(self, machine_id: str) -> AbstractAsyncContextManager[Viewer]:
        return self._known(machine_id).console()

    async def serial_log(self, machine_id: str, max_bytes: int) -> bytes:
        return self._known(machine_id).serial_log(max_bytes)

    async def diagnose(self, machine_id: str) -> Mapping[str, Any]:
        return await self._known(machine_id).diagnose()

    # --- images

    async def images(self) -> Sequence[Image]:
        return self._images.list()

    def image_buildable(self, name: str, architecture: Architecture) -> bool:
        return self._images.buildable(name, architecture)

    async def build_image(
        self, name: str, architecture: Architecture, progress: Progress, *, rebuild: bool = False
    ) -> Image:
        """Build a variant, then prove that it boots: the trial also tells what can execute it here."""
        await self._accelerators.require(architecture)
        image = await self._images.build(name, architecture, progress, rebuild=rebuild)
        progress(0.95, f"booting {name} for {architecture.value} to prove what can execute it")
        await self._accelerators.choose(architecture, None, self._trial_image)
        return image

    async def delete_image(self, name: str, architecture: Architecture) -> None:
        await self._images.delete(name, architecture)

    async def doctor(self) -> Sequence[Finding]:
        network = await self._find_network()
        strength = doctor.Strength(
            root=self._identities is not None,
            landlock_abi=landlock_abi(),
            network=network.mode,
            network_reason=network.reason,
        )
        return doctor.examine(await self.facts(), strength)
