"""Parameters that several routes take."""

from typing import Annotated

from fastapi import Path, Query

Ident = Annotated[
    str, Path(min_length=1, max_length=63, pattern=r"^[^\x00]+$", description="The machine's name or its id.")
]
Name = Annotated[str, Path(min_length=1, max_length=63, pattern=r"^[^\x00]+$", description="Its name.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many at most.")]
After = Annotated[
    str | None,
    Query(max_length=128, pattern=r"^[^\x00]+$", description="`next` of the page before; nothing for the first."),
]
Position = Annotated[
    str | None, Query(pattern=r"^[0-9]{1,18}$", description="`next` of the page before: a `seq`; else the newest.")
]
Object = Annotated[
    str | None, Query(max_length=128, pattern=r"^[^\x00]+$", description="Only what concerns this id or name.")
]
WaitS = Annotated[float, Query(ge=0, le=300, description="How long to wait, in seconds.")]
