"""Connections to anything but the judge."""

from __future__ import annotations

from attacks.record import REFUSED, Program, probe, steps

WORKED = ("ok: WORKED *",)
S = "import socket"
_TCP = '("127.0.0.1", HOST["tcp"])'


def _probe(name: str, action: str, *, works: tuple[str, ...] = (), before: str = S) -> Program:
    return Program(name=name, source=probe(action, before), expect=REFUSED, works=works)


PROGRAMS = (
    _probe("a handle of the judge by the socket of replies", "socket.socket(fileno=os.dup(3)).getsockopt(1, 77)"),
    _probe("listen on the socket of replies", "socket.socket(fileno=os.dup(3)).listen()"),
    _probe("connect by tcp", f"socket.create_connection({_TCP}, 2).send(b'owned')"),
    _probe(
        "send by udp",
        'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"owned", ("127.0.0.1", HOST["udp"]))',
    ),
    _probe(
        "connect to a socket without a path",
        'socket.socket(socket.AF_UNIX).connect("\\0" + HOST["abstract"])',
    ),
    _probe("connect to a socket on a path", 'socket.socket(socket.AF_UNIX).connect(HOST["socket"])', works=WORKED),
    Program(
        name="send to a socket on a path without connecting",
        source=probe('socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"owned", HOST["datagram"])', S),
        expect=REFUSED,
        works=WORKED,
    ),
    _probe(
        "connect by http",
        "urlopen(f\"http://127.0.0.1:{HOST['tcp']}/\", timeout=2).status",
        before="from urllib.request import urlopen",
    ),
    _probe("connect by asyncio", f"asyncio.run(asyncio.open_connection(*{_TCP}))", before="import asyncio"),
    _probe("connect by multiprocessing", f"Client({_TCP})", before="from multiprocessing.connection import Client"),
    _probe("fast open by tcp", f'socket.socket().sendto(b"owned", 0x20000000, {_TCP})'),
    _probe(
        "send to a message's own address",
        'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendmsg([b"owned"], [], 0, ("127.0.0.1", HOST["udp"]))',
    ),
    _probe("a raw socket", "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    _probe("a packet socket", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    _probe("a vsock to the host machine", "socket.socket(socket.AF_VSOCK).connect((2, 1024))"),
    _probe("an address of the outside", 'socket.create_connection(("192.0.2.1", 80), 0.3)'),
    _probe("a name of the outside", 'socket.getaddrinfo("example.com", 80)'),
    _probe("the cloud's metadata", 'socket.create_connection(("169.254.169.254", 80), 0.3)'),
    Program(
        name="listen for others",
        source=probe('socket.create_server(("0.0.0.0", 0)).getsockname()[0]', S),
        expect=REFUSED,
        works=WORKED,
    ),
    Program(
        name="listen without a path",
        source=steps("s = socket.socket(socket.AF_UNIX)\ns.bind('\\0hostile-listener')\ns.listen()\nreturn 1", S),
        expect=REFUSED,
        works=WORKED,
    ),
    Program(
        name="the kernel's cipher socket",
        source=probe('socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).bind(("hash", "sha256"))', S),
        expect=REFUSED,
    ),
    Program(
        name="the kernel's routing socket",
        source=probe("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).bind((0, 0))", S),
        expect=REFUSED,
        works=WORKED,
    ),
    # One of a pair of datagram sockets can be connected again, to somebody else.
    _probe(
        "connect one of a pair elsewhere",
        'socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].connect(HOST["datagram"])',
        works=WORKED,
    ),
)
