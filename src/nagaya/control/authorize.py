"""Who asks, whether they may, and that it is written down.

Every public function of ``control/ops`` is an :func:`operation`: it is authorized before it does anything, a refused
or failed attempt is recorded with the error's code, a read is counted, and a change records itself through
:func:`record` in its own transaction. A test walks the package and demands the decorator and the record.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nagaya.control import ledger
from nagaya.control.store import Transaction
from nagaya.errors import Forbidden, InternalError, NagayaError, chain

if TYPE_CHECKING:
    from nagaya.control.plane import Plane

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks for an operation."""

    actor: str
    """As the audit shows it: ``local:1000 (taro)``."""
    scopes: frozenset[str] = field(default_factory=lambda: frozenset({"*"}))
    """What it may do: actions (``machine.create``), their nouns (``machine.*``), or ``*``. Local users: ``*``."""


@dataclass(slots=True)
class Attempt:
    """One operation under way."""

    caller: Caller
    action: str
    name: str | None
    """The object as the caller named it."""
    recorded: bool = False


_attempt: ContextVar[Attempt] = ContextVar("attempt")


def authorize(caller: Caller, action: str, name: str | None) -> None:
    """Raises Forbidden when ``caller`` may not do ``action`` to the object ``name``."""
    noun = action.partition(".")[0]
    if not caller.scopes & {"*", f"{noun}.*", action}:
        raise Forbidden(
            f"{caller.actor} may not do {action}" + (f" to {name}" if name else ""),
            hint="Ask somebody who may to grant it",
            details={"actor": caller.actor, "action": action},
        )


async def record(
    tx: Transaction,
    object_kind: str,
    object_id: str | None,
    object_name: str | None,
    *,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """Record the operation under way, in the transaction that does it."""
    attempt = _attempt.get()
    await ledger.record(
        tx, attempt.caller.actor, attempt.action, object_kind, object_id, object_name, before=before, after=after
    )
    attempt.recorded = True


def operation(action: str, *, reads: bool = False) -> Callable[[F], F]:
    """Make ``function(plane, caller, …)`` an operation named ``action``; ``reads`` for those that change nothing.

    Coroutine functions and asynchronous generator functions are taken. When the third argument is a string, it names
    the object.
    """

    def wrap(function: F) -> F:
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def streamed(plane: Plane, caller: Caller, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                async with _attempted(plane, caller, action, reads, True, args):
                    values = function(plane, caller, *args, **kwargs)
                    async with aclosing(values):
                        async for value in values:
                            yield value

            made: Callable[..., Any] = streamed
        else:

            @functools.wraps(function)
            async def called(plane: Plane, caller: Caller, *args: Any, **kwargs: Any) -> Any:
                async with _attempted(plane, caller, action, reads, False, args):
                    return await function(plane, caller, *args, **kwargs)

            made = called
        made.__dict__["operation"] = action
        made.__dict__["reads"] = reads
        return cast(F, made)

    return wrap


@asynccontextmanager
async def _attempted(
    plane: Plane, caller: Caller, action: str, reads: bool, streams: bool, args: tuple[object, ...]
) -> AsyncIterator[None]:
    name = args[0] if args and isinstance(args[0], str) else None
    kind = action.partition(".")[0]
    attempt = Attempt(caller, action, name)
    # Not reset afterwards: a generator may be closed in another context, and the next operation sets its own.
    _attempt.set(attempt)
    try:
        authorize(caller, action, name)
        if reads and streams:
            await plane.ledger.read(caller.actor, action, kind, name)
        yield
        if reads and not streams:
            await plane.ledger.read(caller.actor, action, kind, name)
        if not reads and not attempt.recorded:
            raise InternalError(f"{action} did not record itself in the audit")
    except NagayaError as error:
        await plane.ledger.attempt(caller.actor, action, kind, name, error.code, error.problem())
        raise
    except Exception as error:
        await plane.ledger.attempt(caller.actor, action, kind, name, InternalError.code, {"detail": chain(error)})
        raise
