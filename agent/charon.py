"""strongSwan's IKE daemon as a process: found, started, adopted, supervised and stopped; and the address that it carries.

It outlives an agent that is killed, as Envoy does, and is told everything over vici. Nothing of systemd is needed for `charon-systemd`: it is
the daemon that keeps no file outside its own directory, so that several can run on one machine, each in its network namespace.
"""

import asyncio
import errno
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, Literal

import vici

from agent.errors import AgentError
from agent.ipsec import PORT, RETRANSMISSIONS, RETRANSMIT_S
from agent.process import Program, environment, overwrite
from agent.protocol.overlay import OVERLAY

Esp = Literal["kernel", "userspace"]

_PLUGINS = "random nonce x509 openssl pubkey pem pkcs1 pkcs8 revocation hmac sha1 sha2 aes gcm kdf {esp} socket-default vici"
_ESP_PLUGINS: dict[Esp, str] = {"kernel": "kernel-netlink", "userspace": "kernel-libipsec kernel-netlink"}
_OWN_PACKETS = "0x42"
"""Mark of IKE's and ESP's own packets, which must not enter a tunnel."""
_MTU = 1280
"""Inside tunnels: IPv6's least, so that a path of 1,360 bytes carries a whole packet with all that is put around it."""
_CALL_S = 5.0
_LOG_LIMIT_BYTES = 4 << 20
_ADD_ADDRESS, _REMOVE_ADDRESS, _ADD_ROUTE = 0x8916, 0x8936, 0x890B
"""`SIOCSIFADDR`, `SIOCDIFADDR` and `SIOCADDRT` of <linux/sockios.h>."""
_REJECT = 0x0200
"""`RTF_REJECT` of <linux/route.h>."""
_LAST_RESORT = 1 << 20
"""Metric of the route that is taken where no tunnel leads."""


class CharonFailed(AgentError):
    """The daemon does not answer as it should; the message says why."""


class CharonRefused(CharonFailed):
    """It answers, and does not do what it was told."""


class NoIpsec(AgentError):
    """Why this node cannot be an end of IPsec tunnels, in words."""


def find_charon(wanted: Path | None) -> Path:
    """Raises `NoIpsec`."""
    found = str(wanted) if wanted is not None else shutil.which("charon-systemd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise NoIpsec("strongSwan is not installed: there is no charon-systemd")
    if not os.access(found, os.X_OK):
        raise NoIpsec(f"{found} (charon) is not an executable file")
    return Path(found)


def who_encrypts(wanted: str) -> Esp:
    """`auto`: the kernel, if what it needs for ESP is loaded."""
    if wanted == "auto":
        return "kernel" if all(Path("/sys/module", module).exists() for module in ("esp4", "esp6")) else "userspace"
    return "kernel" if wanted == "kernel" else "userspace"


def prepare(address: str, esp: Esp) -> None:
    """Make the network of this node ready for the daemon; raises `NoIpsec` where that is not possible. Repeating it changes nothing."""
    if esp == "userspace":
        try:
            os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise NoIpsec(f"/dev/net/tun cannot be opened: {error.strerror}") from error
    try:
        _assign(_ADD_ADDRESS, address)
        _reject_the_rest()
    except OSError as error:
        why = {errno.EPERM: "NET_ADMIN is missing", errno.EACCES: "IPv6 is disabled there"}.get(error.errno or 0, error.strerror)
        raise NoIpsec(f"the loopback interface cannot have the address {address}: {why}") from error


def _assign(request: int, address: str) -> None:
    """Add or remove an address of the loopback interface: `struct in6_ifreq`."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as handle, suppress(FileExistsError):
        fcntl.ioctl(handle, request, struct.pack("=16sIi", IPv6Address(address).packed, 128, socket.if_nametoindex("lo")))


def _reject_the_rest() -> None:
    """What no tunnel takes must not leave in clear: `struct in6_rtmsg` of a route for the whole overlay that leads nowhere."""
    nowhere = bytes(16)
    route = struct.pack(
        "@16s16s16sIHHILIi",
        OVERLAY.network_address.packed,
        nowhere,
        nowhere,
        0,
        OVERLAY.prefixlen,
        0,
        _LAST_RESORT,
        0,
        _REJECT,
        socket.if_nametoindex("lo"),
    )
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as handle, suppress(FileExistsError):
        fcntl.ioctl(handle, _ADD_ROUTE, route)


@dataclass
class Charon(Program):
    name = "charon"
    esp: Esp
    address: str
    """Inside tunnels."""

    async def stop(self) -> None:
        """End, which closes its tunnels, and take its address away."""
        if self.pid is not None:
            await super().stop()
            with suppress(OSError):
                _assign(_REMOVE_ADDRESS, self.address)

    def kill(self) -> None:
        """One that hangs: `run` starts another."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    @contextmanager
    def session(self, patience_s: float | None = None) -> Iterator[vici.Session]:
        """To use within a thread; raises `CharonFailed` for whatever goes wrong inside."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.settimeout(_CALL_S if patience_s is None else patience_s)
                connection.connect(str(self.run_dir / "vici.sock"))
                yield vici.Session(connection)
            except vici.exception.CommandException as error:
                raise CharonRefused(str(error)) from error
            except (OSError, vici.exception.SessionException, vici.exception.DeserializationException) as error:
                raise CharonFailed(str(error) or type(error).__name__) from error

    def check(self) -> None:
        """Raises `NoIpsec` if the daemon runs without what encrypts, and `CharonFailed` if it does not answer."""
        with self.session() as session:
            loaded = [name.decode() for name in session.stats()["plugins"]]
        if self.esp == "userspace" and "kernel-libipsec" not in loaded:
            raise NoIpsec("strongSwan lacks the plugin kernel-libipsec, and the kernel does not encrypt")

    async def _fault(self) -> str:
        try:
            await asyncio.to_thread(self.check)
        except CharonFailed as error:
            return str(error)
        return ""

    def _launch(self) -> int:
        prepare(self.address, self.esp)
        overwrite(self.run_dir / "strongswan.conf", self._config())
        (self.run_dir / "vici.sock").unlink(missing_ok=True)
        inherited = {name: value for name, value in environment().items() if name != "NOTIFY_SOCKET"}
        with self.log_path.open("ab") as output:
            self._child = subprocess.Popen(
                [str(self.binary)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**inherited, "STRONGSWAN_CONF": str(self.run_dir / "strongswan.conf")},
            )
        return self._child.pid

    def _config(self) -> str:
        """In strongSwan's own format, which wants a line for each setting."""
        plugins: dict[str, Any] = {
            "socket-default": {"fwmark": _OWN_PACKETS},
            "kernel-netlink": {"fwmark": f"!{_OWN_PACKETS}", "mtu": _MTU},
            "vici": {"socket": _quoted(f"unix://{self.run_dir / 'vici.sock'}")},
        }
        daemon = {
            "load": _PLUGINS.format(esp=_ESP_PLUGINS[self.esp]),
            "port": 0,
            "port_nat_t": PORT,
            "retransmit_timeout": RETRANSMIT_S,
            "retransmit_base": 1,
            "retransmit_tries": RETRANSMISSIONS,
            "journal": {"default": -1},
            "filelog": {"agent": {"path": _quoted(str(self.log_path)), "append": "yes", "default": 0, "cfg": -1, "flush_line": "yes"}},
            "plugins": plugins,
        }
        return "\n".join(_section({"charon-systemd": daemon})) + "\n"

    async def _bound_log(self) -> None:
        with suppress(OSError):
            if self.log_path.stat().st_size > _LOG_LIMIT_BYTES:
                os.truncate(self.log_path, 0)  # it is open for appending


def _quoted(path: str) -> str:
    if set(path) & set('"\\\n'):
        raise NoIpsec(f"{path!r} cannot be written in strongSwan's config: choose another run or state directory")
    return f'"{path}"'


def _section(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from (f"{name} {{", *_section(value), "}")
        else:
            yield f"{name} = {value}"
