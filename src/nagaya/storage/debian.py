"""Packages of the distribution this machine runs, for any architecture, without touching the machine.

apt runs on a root of its own (lists, cache, an empty dpkg state) that takes mirror, suite and keyring from the
machine's own configuration, so it needs no rights and no setting: what can install packages here can build images
here. apt checks the signatures and the digests; nothing is installed or unpacked, packages are only read.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

from nagaya import host
from nagaya.errors import ImageUnusable, OutOfResources, TimedOut
from nagaya.model.machine import Architecture
from nagaya.model.node import Progress

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DPKG_ARCHITECTURE: Final[Mapping[Architecture, str]] = {
    Architecture.X86_64: "amd64",
    Architecture.AARCH64: "arm64",
    Architecture.PPC64LE: "ppc64el",
    Architecture.S390X: "s390x",
}

_FETCH_TIMEOUT_S: Final = 1800.0
_QUERY_TIMEOUT_S: Final = 120.0


# --- the machine's own configuration ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Distribution:
    id: str
    """``debian`` or ``ubuntu``."""
    codename: str
    name: str
    """What it calls itself: ``Debian GNU/Linux 12 (bookworm)``."""


def distribution(os_release: str) -> Distribution:
    """Which distribution this is, by os-release(5). Raises ImageUnusable for one without Debian packages."""
    fields = dict(re.findall(r"""^([A-Z_]+)=["']?(.*?)["']?$""", os_release, re.MULTILINE))
    name = fields.get("PRETTY_NAME") or fields.get("NAME") or "this system"
    for candidate in (fields.get("ID", ""), *fields.get("ID_LIKE", "").split()):
        if candidate in ("debian", "ubuntu"):
            codename = fields.get("UBUNTU_CODENAME") if candidate == "ubuntu" else fields.get("DEBIAN_CODENAME")
            return Distribution(candidate, codename or fields.get("VERSION_CODENAME") or "sid", name)
    raise ImageUnusable(
        f"Images are built from packages of Debian or Ubuntu, and this is {name}",
        hint="Build the image on such a machine and copy its directory images/<name>/<architecture>",
    )


Stanza = dict[str, str]
"""One source of packages: fields of deb822(5), their names in lower case."""


def parse_deb822(text: str) -> list[Stanza]:
    """The sources in a ``.sources`` file (sources.list(5)); disabled ones and source packages are left out."""
    stanzas: list[Stanza] = []
    for block in re.split(r"\n[ \t]*\n", text):
        fields: Stanza = {}
        key = ""
        for line in block.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0] in " \t":
                if key:
                    fields[key] += "\n" + line
            else:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0", "off", "without", "disable")
        if enabled and "deb" in fields.get("types", "").split() and fields.get("uris"):
            stanzas.append(fields)
    return stanzas


_ONE_LINE: Final = re.compile(r"^\s*deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>[^#]*)")
_OPTION_FIELDS: Final = {"arch": "architectures", "lang": "languages", "target": "targets"}


def parse_one_line(text: str) -> list[Stanza]:
    """The sources in a one-line ``.list`` file (sources.list(5))."""
    stanzas: list[Stanza] = []
    for match in filter(None, map(_ONE_LINE.match, text.splitlines())):
        stanza = {
            "types": "deb",
            "uris": match["uri"],
            "suites": match["suite"],
            "components": " ".join(match["rest"].split()),
        }
        for key, value in re.findall(r"(\S+?)\s*=\s*(\S+)", match["options"] or ""):
            stanza[_OPTION_FIELDS.get(key, key)] = value.replace(",", " ")
        stanzas.append(stanza)
    return stanzas


def read_sources(etc_apt: Path) -> list[Stanza]:
    """Every source of packages that the machine's apt would use."""
    stanzas: list[Stanza] = []
    for path in [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources") and path.is_file():
            parse = parse_deb822 if path.suffix == ".sources" else parse_one_line
            stanzas += parse(path.read_text(errors="replace"))
    return stanzas


_ALIASES: Final = ("stable", "oldstable", "testing", "unstable", "sid")
_COMPONENTS: Final = ("main", "universe")
_KEPT_FIELDS: Final = ("signed-by", "trusted", "check-valid-until", "check-date", "by-hash")


def choose_sources(
    stanzas: Iterable[Stanza], distro: Distribution, architecture: Architecture, native: str
) -> list[Stanza]:
    """The sources an image is made from: the distribution's own release and its updates, nothing else.

    Backports, security and foreign archives are left out, so that two machines of one release build the same.
    ``native`` is the dpkg architecture of this machine. Raises ImageUnusable when no source is left, or when the
    distribution keeps this architecture on another mirror (Ubuntu does) that is not configured here.
    """
    wanted = DPKG_ARCHITECTURE[architecture]
    releases = (distro.codename, *(_ALIASES if distro.id == "debian" else ()))
    chosen: list[Stanza] = []
    for stanza in stanzas:
        suites = [s for s in stanza.get("suites", "").split() if s.removesuffix("-updates") in releases]
        components = [c for c in stanza.get("components", "").split() if c in _COMPONENTS]
        listed = stanza.get("architectures", "").split()
        # Debian's mirrors have every architecture, whatever this machine reads of them; Ubuntu's do not.
        fits = wanted in (listed or [native]) if distro.id == "ubuntu" else True
        if suites and "main" in stanza.get("components", "").split() and "cdrom:" not in stanza["uris"] and fits:
            kept = {key: stanza[key] for key in _KEPT_FIELDS if key in stanza}
            chosen.append(
                {"types": "deb", "uris": stanza["uris"], "suites": " ".join(suites)}
                | {"components": " ".join(components), "targets": "Packages"}
                | kept
            )
    if chosen:
        return chosen
    if distro.id == "ubuntu" and wanted != native:
        raise ImageUnusable(
            f"No package source for {wanted} is configured: Ubuntu keeps it on its ports mirror, apart from {native}",
            hint=f"Add a source of the ports mirror with 'Architectures: {wanted}', suite {distro.codename} and "
            "components main universe to /etc/apt/sources.list.d, or build this image on Debian",
            command="man sources.list",
        )
    raise ImageUnusable(
        f"apt on this machine has no source for {distro.name}: none in /etc/apt/sources.list or "
        f"/etc/apt/sources.list.d has the suite {distro.codename} with the component main",
        hint=f"Configure the mirror of {distro.codename} as for installing packages, and see that apt reads it",
        command="apt-get update && apt-cache policy busybox-static",
    )


def format_deb822(stanzas: Iterable[Stanza]) -> str:
    return "\n".join("".join(f"{key}: {value}\n" for key, value in stanza.items()) for stanza in stanzas)


# --- apt on a root of its own ----------------------------------------------------------------------------------

_CONFIGURATION: Final = """\
Dir::State "{root}/state";
Dir::State::lists "{root}/lists";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Cache::archives "{root}/archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "{root}/none";
Dir::Etc::sourceparts "{root}/sources";
Dir::Etc::preferences "{root}/none";
Dir::Etc::preferencesparts "{root}/empty";
#clear APT::Architectures;
#clear APT::Update;
#clear APT::Default-Release;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "3";
"""
# Read with -c after the machine's own apt.conf.d, whose proxies and time-outs stay. The hooks in APT::Update belong
# to the machine's own lists. The directories may be closed to apt's usual user, hence the sandbox setting.


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    version: str
    path: Path


class Apt:
    """apt on a root of its own below ``root``, for one architecture. Raises ImageUnusable with what apt said."""

    def __init__(self, root: Path, architecture: Architecture, sources: Sequence[Stanza]) -> None:
        self._root = root
        self._architecture = DPKG_ARCHITECTURE[architecture]
        self._archives = root / "archives"
        for name in ("state", "lists/partial", "cache", "archives/partial", "sources", "empty"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "status").write_bytes(b"")
        (root / "sources/nagaya.sources").write_text(format_deb822(sources))
        self._configuration = root / "apt.conf"
        text = _CONFIGURATION.format(root=root.absolute(), architecture=self._architecture)
        self._configuration.write_text(text)

    async def update(self, progress: Progress) -> None:
        """Fetch the lists of packages, or find that they have not changed."""
        await self._run("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update", progress=progress)

    async def depends(self, package: str) -> tuple[str, ...]:
        """The names a package depends on, first alternatives only."""
        shown = await self._run("apt-cache", "-q", "show", "--no-all-versions", package)
        fields = parse_deb822("Types: deb\nURIs: -\n" + shown.strip())
        depends = fields[0].get("depends", "") if fields else ""
        return tuple(item.split("|")[0].split("(")[0].strip() for item in depends.split(",") if item.strip())

    async def closure(self, packages: Sequence[str]) -> tuple[str, ...]:
        """Everything that an empty system would install for these packages."""
        planned = await self._run("apt-get", "-qq", "--simulate", "install", *packages)
        return tuple(re.findall(r"^Inst (\S+) ", planned, re.MULTILINE))

    async def fetch(self, packages: Sequence[str], progress: Progress) -> tuple[Package, ...]:
        """Have these packages in the cache, download what is missing, and forget all others."""
        with _no_space(self._archives):
            await self._run("apt-get", "-q", "download", *packages, progress=progress, cwd=self._archives)
            shown = await self._run("apt-cache", "-q", "show", "--no-all-versions", *packages)
        versions = re.findall(r"^Package: (\S+)$.*?^Version: (\S+)$", shown, re.MULTILINE | re.DOTALL)
        found: dict[str, Package] = {}
        for name, version in versions:
            for path in self._archives.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"):
                found[name] = Package(name, version, path)
        missing = set(packages) - set(found)
        if missing:
            raise ImageUnusable(
                f"apt did not bring {', '.join(sorted(missing))} for {self._architecture}",
                hint="Look at the package cache, or delete it: the next build fetches everything again",
                command=f"ls -l {self._archives}",
            )
        for path in self._archives.glob("*.deb"):
            if path not in {package.path for package in found.values()}:
                path.unlink()
        return tuple(found[name] for name in packages)

    def trim(self) -> None:
        """Drop what apt makes again by itself in a second."""
        shutil.rmtree(self._root / "cache", ignore_errors=True)

    async def _run(
        self, program: str, *arguments: str, progress: Progress | None = None, cwd: Path | None = None
    ) -> str:
        executable = shutil.which(program)
        if executable is None:
            raise ImageUnusable(
                f"{program} is not on this system, and images are built from packages that apt fetches",
                hint="Build the image on Debian or Ubuntu and copy its directory images/<name>/<architecture>",
            )
        lines: list[str] = []

        def on_line(line: str) -> None:
            lines.append(line)
            if progress is not None and (got := re.match(r"(?:Get|Hit):\d+ \S+ (.*)", line)):
                progress(min(0.95, len(lines) / 20), got[1])

        argv = [executable, "-c", str(self._configuration), *arguments]
        environ = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            completed = await host.run(
                argv,
                environ=environ,
                cwd=cwd or self._root,
                timeout_s=_FETCH_TIMEOUT_S if progress else _QUERY_TIMEOUT_S,
                on_line=on_line if progress else None,
            )
        except host.CommandFailed as error:
            raise explain(error.output, self._architecture, self._root) from error
        except TimeoutError as error:
            raise TimedOut(
                f"{program} {arguments[-1]} did not end in {_FETCH_TIMEOUT_S if progress else _QUERY_TIMEOUT_S:.0f} s",
                hint="Look whether the package mirror answers, then try again: what was fetched is kept",
                command="apt-get update",
            ) from error
        return completed.stdout.decode(errors="replace")


def explain(output: str, architecture: str, root: Path) -> ImageUnusable | OutOfResources:
    """What apt's last words mean for the user."""
    said = " ".join(line[2:].strip() for line in output.splitlines() if line.startswith(("E:", "W:"))) or output.strip()
    said = said[-600:]
    if re.search(r"No space left|not enough free space|don't have enough free space|Disk quota", output):
        free = shutil.disk_usage(root).free // 2**20
        return OutOfResources(
            f"No room for the packages of an image: {free} MiB are free under {root}, about 300 are needed",
            hint="Make room there, then build again: what was fetched is kept",
            command=f"df -h {root}",
            details={"free_mib": free},
        )
    if match := re.search(
        r"(?:Unable to locate package|No packages found|Can't find a source to download|"
        r"has no installation candidate)(?: (\S+))?",
        output,
    ):
        return ImageUnusable(
            f"This machine's package mirror has no package {match[1] or 'of that name'} for {architecture}: {said}",
            hint="Not every mirror carries every architecture; see what yours has, or build the image elsewhere",
            command="apt-get update && apt-cache policy busybox-static",
        )
    if re.search(r"NO_PUBKEY|is not signed|couldn't be verified|EXPKEYSIG|BADSIG|Hash Sum mismatch", output):
        return ImageUnusable(
            f"The packages cannot be trusted: {said}",
            hint="Renew the keyring of the distribution (package debian-archive-keyring or ubuntu-keyring)",
            command="apt-get install debian-archive-keyring",
        )
    if re.search(
        r"Could not resolve|Could not connect|Connection (?:failed|timed out|refused)|Failed to fetch|"
        r"Unable to connect|Temporary failure|404 +Not Found",
        output,
    ):
        return ImageUnusable(
            f"The package mirror of this machine cannot be reached: {said}",
            hint="Look at the network and at apt's proxy, until apt itself works; then build again",
            command="apt-get update",
        )
    return ImageUnusable(f"apt failed: {said}", hint="See whether apt works on this machine", command="apt-get update")


@contextmanager
def _no_space(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain(error.strerror or str(error), "", directory) from error


# --- reading a package -----------------------------------------------------------------------------------------
# deb(5): an ar archive whose member data.tar.* holds the files.

_AR_MAGIC: Final = b"!<arch>\n"
_AR_HEADER: Final = 60


class Deb:
    """The files of one package, read in any order. A context manager; nothing is written but a temporary file."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path
        # Unnamed, so a killed build leaves nothing; on disk, since kernels unpack to hundreds of megabytes.
        self._plain: IO[bytes] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        try:
            with path.open("rb") as package:
                shutil.copyfileobj(_data_member(package), self._plain, 2**20)
            self._plain.seek(0)
            self._tar = tarfile.open(fileobj=self._plain, mode="r:")  # noqa: SIM115
            self._members = {_normal(member.name): member for member in self._tar}
        except (tarfile.TarError, ValueError, EOFError, lzma.LZMAError, zstd.ZstdError) as error:
            self._plain.close()
            raise ImageUnusable(
                f"The package {path.name} is damaged: {error}", hint="Delete it and build again", command=f"rm {path}"
            ) from error

    def __enter__(self) -> Deb:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()
        self._plain.close()

    def names(self) -> Iterator[str]:
        """Paths of files and links, without a leading slash."""
        return (name for name, member in self._members.items() if not member.isdir())

    def read(self, name: str) -> bytes:
        """A file's content; links inside the package are followed. Raises KeyError."""
        for _ in range(8):
            member = self._members[name]
            if not (member.issym() or member.islnk()):
                extracted = self._tar.extractfile(member)
                if extracted is None:
                    break
                return extracted.read()
            target = member.linkname
            if member.islnk():
                name = _normal(target)
            else:
                name = _normal(target if target.startswith("/") else os.path.join(os.path.dirname(name), target))
        raise KeyError(name)


def _normal(path: str) -> str:
    return os.path.normpath("/" + path).lstrip("/")


def _data_member(package: IO[bytes]) -> IO[bytes]:
    if package.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("not a Debian package")
    openers: Mapping[str, Callable[[IO[bytes]], object]] = {
        "data.tar": lambda f: f,
        "data.tar.gz": lambda f: gzip.GzipFile(fileobj=f),
        "data.tar.xz": lzma.LZMAFile,
        "data.tar.zst": zstd.ZstdFile,
    }
    while len(header := package.read(_AR_HEADER)) == _AR_HEADER:
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name in openers:
            return cast(IO[bytes], openers[name](io.BytesIO(package.read(size))))
        package.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no data.tar in a format we know")
