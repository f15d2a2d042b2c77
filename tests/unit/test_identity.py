"""What all machines share is taken away only when no machine of the host is left."""

from __future__ import annotations

import threading
from pathlib import Path

from nagaya.node.identity import Identities


def test_what_machines_share_stays_while_one_has_an_id(tmp_path: Path) -> None:
    identities = Identities(1_900_000_000, 16, tmp_path / "claims")
    machine = tmp_path / "machine"
    machine.mkdir()
    taken_away: list[bool] = []
    uid = identities.claim(machine, None)
    identities.when_unused(lambda: taken_away.append(True))
    assert not taken_away
    identities.release(machine, uid)
    identities.when_unused(lambda: taken_away.append(True))
    assert taken_away == [True]


def test_no_machine_gets_an_id_while_what_it_needs_is_taken_away(tmp_path: Path) -> None:
    identities = Identities(1_900_000_000, 16, tmp_path / "claims")
    machine = tmp_path / "machine"
    machine.mkdir()
    identities.release(machine, identities.claim(machine, None))
    order: list[str] = []
    begun, claiming = threading.Event(), threading.Event()

    def take_away() -> None:
        begun.set()
        assert claiming.wait(5)
        # The other thread is at the claim now, or about to be; it cannot pass before this block ends.
        other.join(0.1)
        order.append("taken away")

    def claim() -> None:
        assert begun.wait(5)
        claiming.set()
        identities.claim(machine, None)
        order.append("claimed")

    other = threading.Thread(target=claim)
    other.start()
    identities.when_unused(take_away)
    other.join(5)
    assert order == ["taken away", "claimed"]
