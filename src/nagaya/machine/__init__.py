"""The engine. It is also a library: no server, no database, just guests.

Boot a guest, run a command in it, stop it::

    import asyncio
    from pathlib import Path

    from nagaya.machine import Machine

    IMAGE = Path("/var/lib/nagaya/images/tiny/x86_64")  # made by `nagaya image build tiny`


    async def main() -> None:
        async with Machine.boot(IMAGE, memory_mib=256) as machine:
            await machine.ready()
            result = await machine.run(["uname", "-a"])
            print(result.stdout.decode(), end="")
            stopped = await machine.stop()
            print(stopped.why)  # requested (acpi)


    asyncio.run(main())

Leaving the block ends the guest, whatever happened in it. What a server does for a machine beyond this (its own user
id, limits, an outbound network, surviving the program that started it) is composed in ``nagaya.node``.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import msgspec

from nagaya.errors import Conflict, ImageUnusable, LaunchFailed, TimedOut
from nagaya.machine.accelerator import Accelerators, host_architecture
from nagaya.machine.compile import Launch, compile, machine_type
from nagaya.machine.console import Viewer
from nagaya.machine.driver import Driver, Facts, Prepared
from nagaya.machine.process import Confinement
from nagaya.model.image import Image
from nagaya.model.machine import (
    Accelerator,
    Crashed,
    Desired,
    MachineSpec,
    Observation,
    Paused,
    Running,
    State,
    StopMode,
    Stopped,
    Wanted,
)
from nagaya.model.network import Network
from nagaya.model.node import Executed

__all__ = ["Machine"]


class Machine:
    """One guest, for as long as the block of :meth:`boot` lasts."""

    def __init__(self, driver: Driver, changed: asyncio.Condition, wanted: Wanted) -> None:
        self.driver = driver
        """The machine's driver, for all that is not offered here."""
        self._changed = changed
        self._wanted = wanted

    @classmethod
    @contextlib.asynccontextmanager
    async def boot(
        cls,
        image: Path,
        *,
        name: str = "guest",
        cpus: int = 1,
        memory_mib: int = 256,
        accelerator: Accelerator | None = None,
        directory: Path | None = None,
    ) -> AsyncIterator[Machine]:
        """Boot the image variant in the directory ``image``; leaving the block ends the guest.

        ``accelerator``: None takes the best that works here, which is proved by booting the image once (the verdict is
        kept in ``directory``). ``directory``: where the machine's files go and stay; None for a temporary one.

        Raises ImageUnusable, EmulatorMissing, AcceleratorRefused, LaunchFailed.
        """
        async with contextlib.AsyncExitStack() as stack:
            home = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nagaya-")))
            data, runtime = home / "data", home / "run"
            for place in (data, runtime):
                place.mkdir(parents=True, exist_ok=True)
            variant = _read_image(image)
            changed = asyncio.Condition()
            prepare = _Preparation(variant, image, Accelerators(home / "accelerators.json", host_architecture()))
            waking: set[asyncio.Task[None]] = set()

            def report(_: Observation) -> None:
                task = asyncio.create_task(_notify(changed))
                waking.add(task)
                task.add_done_callback(waking.discard)

            driver = Driver(str(uuid.uuid4()), data=data, runtime=runtime, prepare=prepare, report=report)
            prepare.machine_id = driver.id
            spec = MachineSpec(
                name=name,
                image=variant.name,
                architecture=variant.architecture,
                machine_type=machine_type(variant.architecture),
                # The prefix is QEMU's own; the rest need only be unique among this program's machines.
                mac="52:54:00:" + secrets.token_bytes(3).hex(":"),
                cpus=cpus,
                memory_mib=memory_mib,
                accelerator=accelerator,
            )
            driver.start()
            stack.push_async_callback(driver.remove)
            before = await driver.known()
            machine = cls(driver, changed, Wanted(driver.id, spec, 1, before.incarnation + 1, Desired.RUNNING))
            driver.put(machine._wanted)
            state = await machine.wait(lambda state: isinstance(state, Running | Crashed), 120.0)
            if isinstance(state, Crashed):
                raise LaunchFailed(state.why, hint=state.hint, details=driver.observation.error or {})
            yield machine

    @property
    def state(self) -> State:
        return self.driver.state

    async def wait(self, condition: Callable[[State], bool], timeout_s: float = 60.0) -> State:
        """Wait until the machine's state fulfils a condition, and return it. Raises TimedOut."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: condition(self.state))
                return self.state
        except TimeoutError as error:
            raise TimedOut(f"The machine is {self.state} after {timeout_s:g} s") from error

    async def ready(self, timeout_s: float = 120.0) -> None:
        """Wait until the guest says that it is up. Raises Conflict when it ends before, and TimedOut."""
        state = await self.wait(lambda s: isinstance(s, Stopped | Crashed) or getattr(s, "ready", False), timeout_s)
        if isinstance(state, Stopped | Crashed):
            hint = state.hint if isinstance(state, Crashed) else None
            raise Conflict(f"The machine ended before it was ready: {state.why}", hint=hint)

    async def run(self, argv: Sequence[str], stdin: bytes | None = None, timeout_s: float = 60.0) -> Executed:
        """Run a command in the guest, through its agent. Raises what Driver.execute() raises."""
        return await self.driver.execute(argv, stdin, timeout_s)

    def console(self) -> AbstractAsyncContextManager[Viewer]:
        """Join the serial console: iterate over the viewer to read, ``write`` to type."""
        return self.driver.console()

    async def pause(self) -> None:
        """Stop its processors; its memory stays."""
        self._want(desired=Desired.PAUSED)
        await self.wait(lambda state: isinstance(state, Paused))

    async def resume(self) -> None:
        self._want(desired=Desired.RUNNING)
        await self.wait(lambda state: isinstance(state, Running))

    async def restart(self) -> None:
        """Stop and boot again; returns when the new QEMU runs."""
        incarnation = self._wanted.incarnation + 1
        self._want(desired=Desired.RUNNING, incarnation=incarnation)
        await self.wait(
            lambda s: self.driver.observation.incarnation == incarnation and isinstance(s, Running | Crashed)
        )

    async def stop(self, *, force: bool = False, deadline_s: float = 30.0) -> Stopped | Crashed:
        """Ask the guest to power off, and cut the power after ``deadline_s`` (or at once); says how it ended."""
        mode = StopMode.FORCE if force else StopMode.GRACEFUL
        self._want(desired=Desired.STOPPED, stop_mode=mode, stop_deadline_s=deadline_s)
        state = await self.wait(lambda s: isinstance(s, Stopped | Crashed), deadline_s + 30.0)
        assert isinstance(state, Stopped | Crashed)
        return state

    def _want(
        self,
        *,
        desired: Desired,
        incarnation: int | None = None,
        stop_mode: StopMode = StopMode.GRACEFUL,
        stop_deadline_s: float = 30.0,
    ) -> None:
        self._wanted = replace(
            self._wanted,
            generation=self._wanted.generation + 1,
            desired=desired,
            incarnation=incarnation or self._wanted.incarnation,
            stop_mode=stop_mode,
            stop_deadline_s=stop_deadline_s,
        )
        self.driver.put(self._wanted)


class _Preparation:
    """What node/service does for a server's machines, at its simplest: this user, no limits, no way out."""

    def __init__(self, image: Image, directory: Path, accelerators: Accelerators) -> None:
        self.machine_id = ""
        self._image = image
        self._directory = directory.absolute()
        self._accelerators = accelerators

    async def __call__(self, spec: MachineSpec, avoid: Accelerator | None) -> Prepared:
        image = self._image
        verdict = await self._accelerators.choose(
            spec.architecture, spec.accelerator, lambda _: (image, self._directory), avoid=avoid
        )
        network = Network("isolated", "a machine of the library has no way out")
        launch = Launch(
            machine_id=self.machine_id,
            emulator=await self._accelerators.require(spec.architecture),
            accelerator=verdict.accelerator,
            kernel=str(self._directory / image.kernel.name),
            initrd=str(self._directory / image.initrd.name),
            cmdline=image.cmdline,
            disk=None,
            network=network,
        )
        facts = Facts(
            accelerator=verdict.accelerator,
            accelerator_reason=verdict.reason,
            network=network.mode,
            network_reason=network.reason,
            ready_line=image.ready_line,
            architecture=spec.architecture,
            agent=image.agent,
        )
        return Prepared(compile(spec, launch), Confinement(uid=None, gid=None, cgroups=()), facts)


async def _notify(changed: asyncio.Condition) -> None:
    async with changed:
        changed.notify_all()


def _read_image(directory: Path) -> Image:
    try:
        return msgspec.json.decode((directory / "manifest.json").read_bytes(), type=Image)
    except (OSError, msgspec.MsgspecError) as error:
        raise ImageUnusable(
            f"{directory} holds no image: {error}", hint="Build one", command="nagaya image build tiny"
        ) from error
