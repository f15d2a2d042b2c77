"""One request and its answer: what a handler is given, and how things of ``wire`` become bytes.

Bodies are decoded and checked by the structs of ``wire`` alone, and answers are encoded from them. Handlers therefore
hold no validation, no error handling and no JSON.
"""

# No postponed annotations here: FastAPI cannot resolve them on callable objects (Decoded).

import base64
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from fastapi import Depends, Header, Request
from fastapi.responses import Response

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.idempotency import Reply, once
from nagaya.control.plane import Plane
from nagaya.errors import InvalidInput, NagayaError, NotAcceptable, TooLarge, UnsupportedMedia

BODY_MAX: Final = 16 * 1024 * 1024
"""Bytes. The largest sensible body is a command with 8 MiB of standard input."""

PROBLEM: Final = "application/problem+json"
JSON: Final = "application/json"

T = TypeVar("T", bound=wire.Body)


# --- errors ----------------------------------------------------------------------------------------------------


def problem(error: NagayaError, headers: dict[str, str] | None = None) -> Response:
    """RFC 9457. ``headers`` are those the status asks for (Allow, WWW-Authenticate)."""
    return Response(msgspec.json.encode(error.problem()), error.status, headers, media_type=PROBLEM)


# --- bodies ----------------------------------------------------------------------------------------------------


async def read_body(request: Request) -> bytes:
    """The whole body. Raises TooLarge before more than BODY_MAX bytes are held."""
    if hasattr(request.state, "body"):
        return typing.cast(bytes, request.state.body)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > BODY_MAX:
            raise TooLarge(
                f"The body is larger than {BODY_MAX // 2**20} MiB, the most that is accepted",
                hint="Pass large data through a disk or the guest's network instead",
                details={"limit_bytes": BODY_MAX},
            )
        chunks.append(chunk)
    request.state.body = b"".join(chunks)
    return typing.cast(bytes, request.state.body)


class Decoded(Generic[T]):
    """A dependency: the request's JSON body as a struct. Not ``required``: no body means all defaults."""

    def __init__(self, struct: type[T], *, required: bool = True) -> None:
        self.struct = struct
        self.required = required
        self._decoder = msgspec.json.Decoder(struct)

    async def __call__(self, request: Request) -> Any:
        content = await read_body(request)
        if not content and not self.required:
            return self.struct()
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != JSON:
            raise UnsupportedMedia(
                f"The body is {media or 'of no stated type'}; this route takes {JSON}",
                hint=f"Send the header Content-Type: {JSON}",
            )
        try:
            return self._decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise explain(self.struct, error, content) from error

    def _decode(self, content: bytes) -> Any:
        try:
            return self._decoder.decode(content)
        except msgspec.ValidationError:
            return msgspec.convert(_whole(msgspec.json.decode(content)), self.struct)


def _whole(value: Any) -> Any:
    """``512.0`` as ``512``: JSON has one kind of number, and some languages write whole ones so."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {key: _whole(item) for key, item in value.items()} if isinstance(value, dict) else value


def explain(struct: type[wire.Body], error: Exception, content: bytes) -> InvalidInput:
    """What is wrong with a body, for the person who wrote it: the field, and what it takes."""
    text, _, at = str(error).partition(" - at `$")
    field = at.strip("`.")
    if not isinstance(error, msgspec.ValidationError):
        return InvalidInput(f"The body is not JSON that can be read: {text}", details={"error": text})
    fields = struct.__struct_encode_fields__
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        near = difflib.get_close_matches(unknown[1], fields, 1)
        return InvalidInput(
            f"There is no field '{unknown[1]}' here" + (f"; did you mean '{near[0]}'?" if near else ""),
            hint=f"The fields are {', '.join(fields)}",
            details={"field": unknown[1], "fields": list(fields)},
        )
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text):
        return InvalidInput(f"The field '{missing[1]}' is missing", details={"field": missing[1]})
    expected = _expected(struct, re.split(r"[.\[]", field)[0])
    text = text.replace("`", "")
    said = f"{text[:1].lower()}{text[1:]}"
    given = _given(content, field)
    if given is None:
        message = f"{field}: {said}" if field else text
    elif expected and "matching regex" in said:
        # The hint says in words what the pattern says.
        message = f"{field} cannot be {given}"
    else:
        message = f"{field} cannot be {given}: {_BOUND.sub(_bound, said)}"
    return InvalidInput(
        message,
        hint=expected and (f"'{field}': {expected}" if expected[0].isupper() else f"'{field}' takes {expected}"),
        details={"field": field or None, "error": text, "expected": expected},
    )


_BOUND = re.compile(r"expected \w+ ([<>])= (\S+)")


def _bound(found: re.Match[str]) -> str:
    """``expected int >= 96`` in words."""
    return f"the {'least' if found[1] == '>' else 'most'} is {found[2]}"


def _given(content: bytes, field: str) -> str | None:
    """The value of a field of a body, short enough to be repeated; None for one inside another, or a longer one."""
    body = msgspec.json.decode(content)
    value = body.get(field) if isinstance(body, dict) else None
    shown = json.dumps(value, ensure_ascii=True)
    return shown if isinstance(value, str | int | float) and len(shown) <= 80 else None


def _expected(struct: type[wire.Body], field: str) -> str | None:
    """What a field takes, in the words of its declaration; None when the message already says it."""
    hint = typing.get_type_hints(struct, include_extras=True).get(field)
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            return "one of " + ", ".join(map(str, typing.get_args(option)))
        for meta in typing.get_args(option)[1:] if typing.get_origin(option) is Annotated else ():
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description.rstrip(".")
    return None


# --- the exchange ----------------------------------------------------------------------------------------------


class Exchange:
    """What every handler gets: the control plane, who asks, and how to answer."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.plane: Plane = request.app.state.plane
        self.caller: Caller = request.scope["nagaya.caller"]
        self.if_match: int | None = None
        """The generation that If-Match names; None when any will do; -1 (which matches none) for no tag of ours."""

    def reply(self, value: msgspec.Struct) -> Response:
        """``value`` as JSON; a machine carries its ETag and answers If-None-Match."""
        content = wire.encode(value)
        headers: dict[str, str] = {}
        if isinstance(value, wire.Machine):
            headers["ETag"] = etag = entity_tag(value.generation, content)
            if etag in _tags(self.request.headers.get("if-none-match")):
                return Response(None, 304, headers)
        return Response(content, 200, headers, media_type=JSON)

    def accepted(self, value: wire.Accepted) -> Response:
        """202, with the task to follow as Location."""
        return _answer(Reply(202, wire.encode(value)))

    async def once(self, perform: Callable[[], Awaitable[msgspec.Struct | None]], status: int = 202) -> Response:
        """Answer a POST; a repetition with the same Idempotency-Key is answered like the first and does nothing."""

        async def answer() -> Reply:
            value = await perform()
            return Reply(status, b"" if value is None else wire.encode(value))

        key = self.request.headers.get("idempotency-key")
        if key is None:
            return _answer(await answer())
        asked = f"{self.request.method} {self.request.url.path}?{self.request.url.query} {self.if_match} ".encode()
        fingerprint = hashlib.blake2b(asked + await read_body(self.request), digest_size=32).hexdigest()
        reply, repeated = await once(self.plane, self.caller, key, fingerprint, answer)
        return _answer(reply, {"Idempotency-Replayed": "true"} if repeated else {})


def _answer(reply: Reply, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if reply.status == 202 and reply.body:
        task = msgspec.json.decode(reply.body, type=wire.Accepted).task
        headers["Location"] = f"/api/v1/tasks/{task.id}"
    return Response(reply.body, reply.status, headers, media_type=JSON if reply.body else None)


def entity_tag(generation: int, content: bytes) -> str:
    """``"7.k3v9a2c4"``: the generation, and a digest of what is shown.

    If-Match looks at the generation alone, so that a guest that merely became ready does not refuse an edit; the
    digest makes If-None-Match see every change of state too.
    """
    digest = base64.b32encode(hashlib.blake2b(content, digest_size=5).digest()).decode().lower()
    return f'"{generation}.{digest}"'


def _tags(header: str | None) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in (header or "").split(",") if tag.strip()]


def accepts(header: str | None, produced: Sequence[str]) -> str | None:
    """The first media type of ``produced`` that an Accept header allows (RFC 9110 §12.5.1); None for none."""
    if header is None or not header.strip():
        return produced[0]
    quality: dict[str, float] = {}
    for item in header.lower().split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        weight = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        quality[media] = float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 1.0

    def wanted(media: str) -> float:
        return quality.get(media, quality.get(media.split("/")[0] + "/*", quality.get("*/*", 0.0)))

    best = max(produced, key=wanted)
    return best if wanted(best) > 0 else None


async def exchange(request: Request) -> Exchange:
    """The dependency of every handler. Raises NotAcceptable before anything is done."""
    route = request.scope["route"]
    produced = list(route.responses[route.status_code or 200].get("content", ())) or [JSON]
    header = request.headers.get("accept")
    chosen = accepts(header, produced) or (accepts(header, [PROBLEM]) and produced[0])
    if chosen is None:
        raise NotAcceptable(
            f"This route answers {' or '.join(produced)}, and the request accepts only {header}",
            hint=f"Send the header Accept: {produced[0]}",
        )
    request.state.media = chosen
    return Exchange(request)


Call = Annotated[Exchange, Depends(exchange)]
"""The exchange of a route that reads."""


async def _once(
    call: Call,
    _key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            pattern="^[!-~]{1,255}$",
            description="Any word of the client's choice. For a day, the same key answers the same again.",
        ),
    ] = None,
) -> Exchange:
    return call


async def _guarded(
    call: Call,
    if_match: Annotated[
        str | None,
        Header(
            alias="If-Match",
            max_length=255,
            description="The machine's ETag: refuse (412) when somebody has changed the machine since.",
        ),
    ] = None,
) -> Exchange:
    if if_match is not None and if_match.strip() != "*":
        match = re.fullmatch(r'"(\d{1,18})(?:\.[0-9a-z]+)?"', if_match.strip())
        call.if_match = int(match[1]) if match else -1
    return call


async def _cached(
    call: Call,
    _tag: Annotated[
        str | None, Header(alias="If-None-Match", max_length=1024, description="An ETag: 304 when it is still true.")
    ] = None,
) -> Exchange:
    return call


Post = Annotated[Exchange, Depends(_once)]
"""The exchange of a POST, which Idempotency-Key makes repeatable: answer it with :meth:`Exchange.once`."""
Guarded = Annotated[Exchange, Depends(_guarded)]
"""The exchange of a change that If-Match guards."""
Cached = Annotated[Exchange, Depends(_cached)]
"""The exchange of a read that If-None-Match shortens."""


async def _action(call: Post, _guard: Guarded) -> Exchange:
    return call  # one exchange per request: the guard has seen the same


Action = Annotated[Exchange, Depends(_action)]
"""The exchange of a POST that If-Match guards."""
