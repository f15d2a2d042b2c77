"""One tree of errors.

Every error a user can meet is a subclass of :class:`NagayaError`. It says what happened and why
(``message``, with figures), what to do next (``hint``, and ``command`` when one command does it), and carries
machine-readable ``details``. ``code`` is stable and documented; ``status`` is what the API answers.

    NagayaError
    ├── InvalidInput            400  the request itself is wrong
    │   └── IdempotencyMismatch 422  a key was used again for another request
    ├── Unauthorized            401  nobody we know
    ├── Forbidden               403  known, but not allowed
    ├── NotFound                404
    ├── Conflict                409  the object is not in a state that allows it
    │   ├── NameTaken           409
    │   ├── GuestAgentUnavailable 409  the guest does not answer (yet)
    │   └── AcceleratorRefused  409  the demanded accelerator does not work here
    ├── MethodNotAllowed        405
    ├── NotAcceptable           406  nothing of what Accept names can be answered
    ├── PreconditionFailed      412  If-Match does not match
    ├── TooLarge                413
    ├── UnsupportedMedia        415  the body is not what the route takes
    ├── EmulatorMissing         424  QEMU is missing or too old
    ├── ImageUnusable           424  an image is missing files or damaged
    ├── OutOfResources          507  memory, processors or disk do not suffice
    ├── NodeUnavailable         503  the node is silent
    ├── TimedOut                504  something did not happen in time
    ├── LaunchFailed            500  QEMU died while starting
    ├── Interrupted             500  a task was cut off and undone
    ├── StartupError            –    the server cannot start (exit code 3)
    │   ├── DatabaseLocked, DataTooNew, PortInUse
    └── InternalError           500  a defect of ours
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class NagayaError(Exception):
    """Something went wrong, and the user is told what, why and what next.

    ``message`` names what happened and why, with figures. ``hint`` is one sentence on what to do.
    ``command`` is a shell command that does it or shows more. ``details`` are JSON-ready figures.
    """

    code: ClassVar[str] = "internal-error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        command: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.command = command
        self.details: dict[str, Any] = dict(details or {})

    def problem(self) -> dict[str, Any]:
        """This error as an RFC 9457 problem document (also how a task stores its error)."""
        body: dict[str, Any] = {
            "type": f"https://nagaya.invalid/errors/{self.code}",
            "title": self.code.replace("-", " "),
            "status": self.status,
            "detail": self.message,
            "code": self.code,
            "retryable": self.retryable,
        }
        if self.hint:
            body["hint"] = self.hint
        if self.command:
            body["command"] = self.command
        if self.details:
            body["details"] = self.details
        return body


class InvalidInput(NagayaError):
    code = "invalid-input"
    status = 400


class IdempotencyMismatch(InvalidInput):
    code = "idempotency-mismatch"
    status = 422


class Unauthorized(NagayaError):
    code = "unauthorized"
    status = 401


class Forbidden(NagayaError):
    code = "forbidden"
    status = 403


class NotFound(NagayaError):
    code = "not-found"
    status = 404


class Conflict(NagayaError):
    code = "conflict"
    status = 409


class NameTaken(Conflict):
    code = "name-taken"


class GuestAgentUnavailable(Conflict):
    code = "guest-agent-unavailable"
    retryable = True


class AcceleratorRefused(Conflict):
    code = "accelerator-refused"


class MethodNotAllowed(NagayaError):
    code = "method-not-allowed"
    status = 405


class NotAcceptable(NagayaError):
    code = "not-acceptable"
    status = 406


class PreconditionFailed(NagayaError):
    code = "precondition-failed"
    status = 412


class TooLarge(NagayaError):
    code = "too-large"
    status = 413


class UnsupportedMedia(NagayaError):
    code = "unsupported-media"
    status = 415


class EmulatorMissing(NagayaError):
    code = "emulator-missing"
    status = 424


class ImageUnusable(NagayaError):
    code = "image-unusable"
    status = 424


class OutOfResources(NagayaError):
    code = "out-of-resources"
    status = 507
    retryable = True


class NodeUnavailable(NagayaError):
    code = "node-unavailable"
    status = 503
    retryable = True


class TimedOut(NagayaError):
    code = "timed-out"
    status = 504
    retryable = True


class LaunchFailed(NagayaError):
    code = "launch-failed"


class Interrupted(NagayaError):
    code = "interrupted"
    retryable = True


class InternalError(NagayaError):
    code = "internal-error"


class StartupError(NagayaError):
    """The server refuses to start; the command line exits with 3."""

    code = "startup-error"


class DatabaseLocked(StartupError):
    code = "database-locked"


class DataTooNew(StartupError):
    code = "data-too-new"


class PortInUse(StartupError):
    code = "port-in-use"


def chain(error: BaseException) -> str:
    """The error and its causes on one line, outermost first; for logs."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = str(current) or type(current).__name__
        parts.append(text if isinstance(current, NagayaError) else f"{type(current).__name__}: {text}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return " <- ".join(parts)
