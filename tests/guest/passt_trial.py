"""Run in a fresh network namespace: what can a guest behind passt reach? Prints one JSON object per trial.

The namespace is the host: loopback, an uplink to an outside (a second namespace) and a bridge of its own, with one
service listening on every address. The guest is this program, speaking Ethernet on passt's socket (a length of four
bytes, then the frame), so it can send what no operating system would: packets to 127.0.0.1, to 0.0.0.0.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import time

from nagaya.network import user

UIDS = range(1_900_000_000, 1_900_000_016)
GUEST_MAC, ANY_MAC = bytes.fromhex("525400000001"), b"\xff" * 6
PORT = 8000
TARGETS = {
    "outside": "192.0.2.254",
    "loopback": "127.0.0.1",
    "other loopback": "127.9.9.9",
    "this host": "0.0.0.0",
    "own address": "192.0.2.1",
    "bridge": "172.17.0.1",
    "forwarded": "192.0.2.7",
    "gateway": user.GATEWAY,
}
FORWARDED = f"""
table ip forwarding {{
  chain output {{
    type nat hook output priority -100;
    ip daddr {TARGETS["forwarded"]} tcp dport {PORT} dnat to {TARGETS["outside"]}
  }}
}}
"""
"""An address of the host that it forwards elsewhere, as container engines do with published ports."""
OUTSIDE = f"""
import socket, sys
sys.stdin.readline()
server = socket.create_server(("0.0.0.0", {PORT}))
print("listening", flush=True)
sys.stdin.readline()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def syn(target: str, source_port: int, gateway_mac: bytes) -> bytes:
    source, destination = socket.inet_aton(user.GUEST_ADDRESS), socket.inet_aton(target)
    tcp = struct.pack("!HHIIBBHHH", source_port, PORT, 1, 0, 0x50, 0x02, 65535, 0, 0)
    pseudo = source + destination + struct.pack("!BBH", 0, 6, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 1, 0x4000, 64, 6, 0, source, destination)
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    return gateway_mac + GUEST_MAC + b"\x08\x00" + header + tcp


def arp() -> bytes:
    mine, asked = socket.inet_aton(user.GUEST_ADDRESS), socket.inet_aton(user.GATEWAY)
    body = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, GUEST_MAC, mine, b"\0" * 6, asked)
    return ANY_MAC + GUEST_MAC + b"\x08\x06" + body


class Guest:
    def __init__(self, wire: socket.socket) -> None:
        self.wire, self.buffer = wire, b""

    def send(self, frame: bytes) -> None:
        self.wire.sendall(struct.pack("!I", len(frame)) + frame)

    def frames(self, seconds: float):
        """Frames that come within so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.wire.settimeout(left)
            try:
                self.buffer += self.wire.recv(65536)
            except TimeoutError:
                return
            while len(self.buffer) >= 4 and len(self.buffer) >= 4 + (size := struct.unpack("!I", self.buffer[:4])[0]):
                frame, self.buffer = self.buffer[4 : 4 + size], self.buffer[4 + size :]
                yield frame

    def gateway_mac(self) -> bytes:
        self.send(arp())
        for frame in self.frames(5):
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\x00\x02":
                return frame[22:28]
        raise SystemExit("passt did not answer ARP")

    def reach(self) -> dict[str, bool]:
        """Which targets answered a SYN with SYN-ACK within two seconds."""
        gateway = self.gateway_mac()
        ports = {40000 + number: name for number, name in enumerate(TARGETS)}
        for port, name in ports.items():
            self.send(syn(TARGETS[name], port, gateway))
        answered = dict.fromkeys(TARGETS, False)
        for frame in self.frames(2):
            if frame[12:14] == b"\x08\x00" and frame[23] == 6:
                port, flags = struct.unpack("!H", frame[36:38])[0], frame[47]
                if port in ports and flags & 0x12 == 0x12:
                    answered[ports[port]] = True
        return answered


def trial(argv: tuple[str, ...]) -> dict[str, bool]:
    ours, theirs = socket.socketpair()
    uid = UIDS.start
    passt = subprocess.Popen(
        [*argv, "--fd", str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        user=uid,
        group=uid,
        extra_groups=[],
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    try:
        return Guest(ours).reach()
    finally:
        passt.kill()
        passt.wait()
        ours.close()


def main() -> None:
    outside = subprocess.Popen(
        ["unshare", "-n", sys.executable, "-c", OUTSIDE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert outside.stdin is not None
    assert outside.stdout is not None
    try:
        ours = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 10
        while os.readlink(f"/proc/{outside.pid}/ns/net") == ours:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ip("link", "set", "lo", "up")
        ip("link", "add", "up0", "type", "veth", "peer", "name", "up1", "netns", str(outside.pid))
        ip("address", "add", "192.0.2.1/24", "dev", "up0")
        ip("address", "add", f"{TARGETS['forwarded']}/24", "dev", "up0")
        ip("link", "set", "up0", "up")
        subprocess.run(["nft", "-f", "-"], input=FORWARDED, text=True, check=True)
        ip("route", "add", "default", "via", "192.0.2.254")
        ip("link", "add", "bridge0", "type", "bridge")
        ip("address", "add", "172.17.0.1/16", "dev", "bridge0")
        ip("link", "set", "bridge0", "up")
        within = ["nsenter", "--target", str(outside.pid), "--net", "ip"]
        subprocess.run([*within, "address", "add", "192.0.2.254/24", "dev", "up1"], check=True)
        subprocess.run([*within, "link", "set", "up1", "up"], check=True)
        outside.stdin.write("go\n")
        outside.stdin.flush()
        assert outside.stdout.readline() == "listening\n"
        service = socket.create_server(("0.0.0.0", PORT), backlog=64)
        network = asyncio.run(user.probe(UIDS))
        closed = trial(network.helper) if network.helper else None
        print(json.dumps({"mode": network.mode, "reason": network.reason, "reached": closed}))
        if network.helper:
            asyncio.run(user.remove(UIDS))
            print(json.dumps({"mode": "without the table", "reached": trial(network.helper)}))
        service.close()
    finally:
        outside.kill()
        outside.wait()


main()
