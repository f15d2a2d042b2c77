"""Names for machines whose owner had none in mind, and their hardware addresses."""

from __future__ import annotations

import hashlib
import random
from typing import Final

ADJECTIVES: Final = """
    amber ample apt bold brave bright brisk calm clear clever cosy crisp curious deft eager early easy fair fond
    frank fresh gentle glad golden grand happy hardy honest humble jolly keen kind lively loyal lucid lucky mellow
    merry mild modest neat nimble noble patient placid plucky polite proud quick quiet rapid ready serene sharp shy
    silent silver smart snug solid spry steady still sturdy sunny sure swift tidy tranquil true upbeat vivid warm
    wise witty young
""".split()  # noqa: SIM905 - a list to read, not to parse
NOUNS: Final = """
    acorn alder anchor aspen badger bamboo beacon birch brook camellia canal cedar cicada cloud comet cove crane
    creek cricket cypress dawn delta dune elm ember falcon fern field firefly fjord flint forest fox garden ginkgo
    glade grove harbor hare hazel heron hill holly iris island ivy juniper kestrel kite lantern larch lark lily
    lotus lynx maple marsh meadow mist moon moss oak orchid otter owl peak pebble pine plover plum pond quail rain
    raven reed ridge river robin rowan sage shore sparrow spring spruce star stone stork stream swan tern thistle
    thrush tide vale wave willow wind wren yew
""".split()  # noqa: SIM905 - a list to read, not to parse


def pleasant_name(taken: int = 0) -> str:
    """``quiet-heron``; with a number when several were already ``taken``."""
    name = f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"
    return name if taken < 3 else f"{name}-{random.randrange(100, 100_000)}"


def mac_address(machine_id: str) -> str:
    """A locally administered unicast address (IEEE 802, clause 8.4), from the machine's id."""
    octets = bytearray(hashlib.sha256(machine_id.encode()).digest()[:6])
    octets[0] = octets[0] & 0xFC | 0x02
    return octets.hex(":")
