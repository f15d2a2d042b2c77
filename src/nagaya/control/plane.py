"""The control plane, composed: store, node, tasks and reconcilers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nagaya.control.nodes import Node
from nagaya.control.store import Store
from nagaya.model.node import Ratios


class Plane:
    """What every operation works on."""

    def __init__(
        self,
        store: Store,
        node: Node,
        ratios: Ratios,
        on_shutdown: Callable[[bool], None],
        *,
        data: str = "",
        listen: Sequence[str] = (),
    ) -> None:
        """``on_shutdown(stop_machines)`` is called once when somebody asks the server to end."""

    async def start(self) -> None:
        """Continue the tasks that were cut off, and begin to reconcile."""

    async def stop(self) -> None:
        """End everything of the control plane; guests and unfinished tasks stay as they are. Closes the store."""
