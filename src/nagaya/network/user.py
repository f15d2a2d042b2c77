"""The network of one machine alone: outbound through passt, or none at all.

passt turns the guest's packets into ordinary sockets of its own, so a guest could reach whatever a local process can:
the host's loopback and every service on any of the host's addresses. passt without gateway mapping offers no address
for the host, but it does not refuse the host's own ones. The kernel can: packets that carry a machine's user id and go
to an address of the host (or a link-local one, where clouds keep credentials) are dropped by a table of nftables that
is Nagaya's own. Where that table cannot be put up (no root, so no user id of the machine's own; no nft; no kernel
support) there is no outbound network: QEMU's built-in one with ``restrict=on`` answers DHCP and nothing else.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
from pathlib import Path
from typing import Final

from nagaya import host
from nagaya.host import CommandFailed
from nagaya.model.network import Network
from nagaya.text import last_lines

GUEST_ADDRESS: Final = "10.0.2.15"
GATEWAY: Final = "10.0.2.2"
"""What guests see: the addresses QEMU's built-in network has, so both modes look alike. Nobody answers at GATEWAY."""
TRIAL_S: Final = 0.5
"""passt that cannot start ends within milliseconds; one that lives this long works."""
_RESOLVERS: Final = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


def table_name(uids: range) -> str:
    return f"nagaya_{uids.start}_{len(uids)}"


def ruleset(uids: range) -> str:
    """The nftables script that keeps processes with these user ids off the host itself. Idempotent, one transaction.

    ``fib daddr type local`` is every address of the host, of any family and on any interface, also ones that are
    added later (nft(8), FIB EXPRESSIONS); 0.0.0.0 and :: are the loopback to connect(2).
    """
    name = table_name(uids)
    match = f"meta skuid {uids.start}-{uids.stop - 1}"
    return "\n".join(
        (
            f"table inet {name} {{}}",
            f"delete table inet {name}",
            f"table inet {name} {{",
            "  chain output {",
            "    type filter hook output priority filter; policy accept;",
            f"    {match} fib daddr type {{ local, broadcast, multicast, anycast }} drop",
            f"    {match} oif lo drop",
            f"    {match} ip daddr {{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16 }} drop",
            f"    {match} ip6 daddr {{ ::/127, fe80::/10 }} drop",
            "  }",
            "}",
            "",
        )
    )


def passt_argv(program: str, usage: str, nameservers: tuple[str, ...]) -> tuple[str, ...]:
    """passt's command line, without its socket. ``usage`` is what ``passt --help`` printed: options vary by version."""
    newer = tuple(
        word for option in ("--map-host-loopback", "--map-guest-addr") if option in usage for word in (option, "none")
    )
    return (
        *(program, "--foreground", "--quiet", "--stderr", "--ipv4-only", "--no-map-gw", *newer),
        *("--tcp-ports", "none", "--udp-ports", "none"),
        *("--address", GUEST_ADDRESS, "--netmask", "255.255.255.0", "--gateway", GATEWAY),
        *(word for server in nameservers for word in ("--dns", server)),
        *(() if nameservers else ("--no-dhcp-dns",)),
        "--no-dhcp-search",
    )


def nameservers(*resolv_confs: str) -> tuple[str, ...]:
    """The resolvers a guest can use: the first file's that names any beyond the host itself, as the host is closed."""
    for text in resolv_confs:
        words = (line.split() for line in text.splitlines())
        found = [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"]
        usable = tuple(server for server in found if _beyond(server))
        if usable:
            return usable[:3]
    return ()


def _beyond(server: str) -> bool:
    try:
        address = ipaddress.ip_address(server)
    except ValueError:
        return False  # an IPv6 address with a zone
    return address.version == 4 and not (address.is_loopback or address.is_unspecified or address.is_link_local)


async def probe(uids: range | None) -> Network:
    """What machines with these user ids get here, tried out; ``uids`` is None when Nagaya is not root.

    Puts up the nftables table that outbound networking needs, see :func:`guard`.
    """
    if uids is None:
        return _isolated("only root can keep passt off the host's own services")
    program = shutil.which("passt")
    if program is None:
        return _isolated("passt is not installed")
    if (problem := await guard(uids)) is not None:
        return _isolated(problem)
    texts = [path.read_text(errors="replace") for path in _RESOLVERS if path.exists()]
    argv = passt_argv(program, await _usage(program), nameservers(*texts))
    problem = await _trial(argv, uids.stop - 1)
    if problem is not None:
        return _isolated(f"passt does not start here: {problem}")
    return Network("passt", "outbound through passt; the host itself is closed by nftables", argv)


async def guard(uids: range) -> str | None:
    """Put up the table that keeps these user ids off the host itself; None when it stands, else why not.

    To be called before every launch with passt, as others may have flushed the host's rules since.
    """
    nft = _nft()
    if nft is None:
        return "nft is not installed, and only nftables keeps passt off the host's own services"
    try:
        await host.run([nft, "-f", "-"], stdin=ruleset(uids).encode(), timeout_s=10)
    except (CommandFailed, TimeoutError) as error:
        return f"nftables cannot keep passt off the host's own services: {error}"
    return None


async def remove(uids: range) -> None:
    """Take Nagaya's table away; nothing happens when it is gone already. Raises CommandFailed."""
    script = f"table inet {table_name(uids)} {{}}\ndelete table inet {table_name(uids)}\n"
    await host.run([_nft() or "nft", "-f", "-"], stdin=script.encode(), timeout_s=10)


def _nft() -> str | None:
    return shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin")


def _isolated(why: str) -> Network:
    return Network("isolated", f"no outbound network: {why}")


async def _usage(program: str) -> str:
    try:
        completed = await host.run([program, "--help"], timeout_s=10)
    except CommandFailed as error:  # Debian 12's ends with 1 after printing it
        return error.output
    return (completed.stdout + completed.stderr).decode(errors="replace")


async def _trial(argv: tuple[str, ...], uid: int) -> str | None:
    """Start passt as an unprivileged user would; None when it stays, else its last words."""
    ours, theirs = socket.socketpair()

    def become() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    with ours, theirs:
        command = [*argv, "--fd", str(theirs.fileno())]
        run = host.run(command, before_exec=become, pass_fds=(theirs.fileno(),), timeout_s=TRIAL_S)
        try:
            await run
        except TimeoutError:
            return None
        except CommandFailed as error:
            # Its last line says why; the ones before are warnings.
            return last_lines(error.output, 1) or str(error)
        except OSError as error:
            return str(error)
    return "it ended at once"
