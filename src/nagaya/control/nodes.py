"""What the control plane asks of a node. One interface, in-process today and over mutual TLS later.

Everything here may be repeated and may be lost: ``put`` is idempotent by generation, and :meth:`Node.observe`
starts with the whole truth before it reports changes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from nagaya.model.image import Image
from nagaya.model.machine import Accelerator, Architecture, MachineSpec, Observation, Wanted
from nagaya.model.node import Executed, Finding, Gone, NodeFacts, Progress, Synced


class Console(Protocol):
    """One viewer of a serial console. The first chunk received is the scroll-back."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def write(self, data: bytes) -> None: ...


class Node(Protocol):
    """A host, as the control plane sees it. Methods raise NagayaError."""

    @property
    def name(self) -> str: ...

    async def facts(self) -> NodeFacts:
        """What it has and can do now; cheap enough for every admission (milliseconds)."""
        ...

    async def choose_accelerator(self, architecture: Architecture, demanded: Accelerator | None) -> Accelerator:
        """What would execute such a machine; proves accelerators that were not tried yet.

        Raises EmulatorMissing, AcceleratorRefused.
        """
        ...

    async def put(self, wanted: Wanted) -> None:
        """Take over what is wanted and return at once; the outcome is seen in observe()."""
        ...

    def observe(self) -> AsyncIterator[Observation | Gone | Synced]:
        """First one Observation per known machine, then Synced, then every change as it happens."""
        ...

    async def provision(self, machine_id: str, spec: MachineSpec) -> None:
        """Make the machine's directory, identity and disk; idempotent. Raises OutOfResources."""
        ...

    async def remove(self, machine_id: str) -> None:
        """Power off what runs and remove everything of the machine; idempotent."""
        ...

    async def execute(self, machine_id: str, argv: Sequence[str], stdin: bytes | None, timeout_s: float) -> Executed:
        """Run a command through the guest agent. Raises Conflict, GuestAgentUnavailable, TimedOut."""
        ...

    def console(self, machine_id: str) -> AbstractAsyncContextManager[Console]:
        """Join the serial console as one more viewer. Raises Conflict when the machine does not run."""
        ...

    async def serial_log(self, machine_id: str, max_bytes: int) -> bytes:
        """The last bytes the guest wrote on its serial console, also of a machine that stopped."""
        ...

    async def diagnose(self, machine_id: str) -> Mapping[str, Any]:
        """QEMU's last words, resource pressure, and monitor answers; JSON-ready.

        Keys: ``qemu_log`` (str), ``resources`` (dict), ``findings`` (list of Finding).
        """
        ...

    async def images(self) -> Sequence[Image]:
        """Every complete image variant on the node."""
        ...

    def image_buildable(self, name: str, architecture: Architecture) -> bool:
        """Whether there is a recipe for this variant."""
        ...

    async def build_image(
        self, name: str, architecture: Architecture, progress: Progress, *, rebuild: bool = False
    ) -> Image:
        """Build (or return, when complete and not ``rebuild``) a variant; concurrent calls share one build.

        Raises EmulatorMissing, ImageUnusable, TimedOut.
        """
        ...

    async def delete_image(self, name: str, architecture: Architecture) -> None: ...

    async def doctor(self) -> Sequence[Finding]: ...
