"""Reaching out. Nothing is sent anywhere but to a loopback: connecting a datagram socket only asks the kernel for a route."""

from __future__ import annotations

import socket
import threading

from executions.attacks.arena import Arena, Attack, Ran, Through
from executions.backends.base import Handle


async def _host_hears_nothing(arena: Arena, handle: Handle, ran: Ran) -> str:
    """A listener of this machine's loopback, and one by an abstract name, wait while the sandbox tries to reach them."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))
        named = socket.socket(socket.AF_UNIX)
        named.bind(f"\0{arena.marker}-host")
        named.listen()
        heard: list[str] = []
        for one, hear in ((server, server.accept), (datagrams, lambda: datagrams.recv(1)), (named, named.accept)):
            one.settimeout(0.2)
            threading.Thread(target=_hear, args=(hear, heard), daemon=True).start()
        code = _REACH.replace("@TCP@", str(server.getsockname()[1])).replace("@UDP@", str(datagrams.getsockname()[1]))
        tried = await arena.run(handle, Attack("reach", (), code=code))
        named.close()
    if heard or tried.through or tried.end != "value":
        raise Through(f"the host's loopback was reached: {heard or tried.through or tried.end}")
    return ", ".join(sorted(set(tried.refused.values())))


def _hear(listen, heard: list[str]) -> None:
    try:
        heard.append(repr(listen()))
    except OSError:
        pass


_REACH = r"""
for host in ('127.0.0.1', 'localhost', '0.0.0.0', '127.1.2.3', '::1', '::ffff:127.0.0.1'):
    attempt(f'TCP {host}', lambda: socket.create_connection((host, @TCP@), 2))
def knock():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        datagram.connect(('127.0.0.1', @UDP@))
        for _ in range(2):
            datagram.send(b'x')  # the second one hears that nobody listens
            time.sleep(0.05)
attempt('UDP', knock)
attempt('abstract', lambda: socket.socket(socket.AF_UNIX).connect('\0@MARKER@-host'))
"""
_ROUTES = r"""
def route(address):
    with socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        datagram.connect((address, 80))
        return datagram.getsockname()
for address in ADDRESSES:
    attempt(address, lambda: route(address))
"""

ATTACKS = (
    Attack("loopback_of_the_host", ("namespaces",), judge=_host_hears_nothing, own_kernel=False),
    Attack(
        "ports_of_neighbours", ("namespaces",),
        code=r"""
for host in ('127.0.0.1', '::1', '0.0.0.0', socket.gethostname()):
    attempt(host, lambda: socket.create_connection((host, 28173), 2))
attempt('anything that listens', lambda: [l for l in open('/proc/net/tcp') if l.split()[3] == '0A' and l.split()[1].endswith(':6E0D')])
""",
    ),
    Attack(
        "metadata_addresses", ("namespaces",), own_kernel=False,
        code="ADDRESSES = ('169.254.169.254', '169.254.170.2', '100.100.100.200', '192.0.0.192', 'fd00:ec2::254', 'fe80::a9fe:a9fe')" + _ROUTES,
    ),
    Attack(
        "private_and_public_ranges", ("namespaces",), own_kernel=False,
        code="ADDRESSES = ('10.0.0.1', '172.16.0.1', '172.17.0.1', '192.168.0.1', '100.64.0.1', '192.0.2.1', '198.51.100.1', '224.0.0.1',\n"
        "             '255.255.255.255', '2001:db8::1', 'fd00::1', 'ff02::1')" + _ROUTES,
    ),
    Attack(
        "interfaces_and_routes", ("namespaces",), own_kernel=False,
        code=r"""
import fcntl, struct
attempt('others than the loopback', lambda: [n for _, n in socket.if_nameindex() if n != 'lo'])
attempt('a route', lambda: open('/proc/net/route').readlines()[1:])
attempt('a route of IPv6', lambda: [l for l in open('/proc/net/ipv6_route') if l.split()[-1] != 'lo'])
control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
attempt('set an address', lambda: fcntl.ioctl(control, 0x8916, struct.pack('16sHH4s8x', b'lo', 2, 0, bytes((10, 0, 0, 1)))))
attempt('take it down', lambda: fcntl.ioctl(control, 0x8914, struct.pack('16sH14x', b'lo', 0)))
attempt('add a device', lambda: output('ip', 'link', 'add', 'x', 'type', 'dummy') or '')
def add_link():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        body = bytes(16) + struct.pack('HH8s', 12, 3, b'dummy0')
        netlink.send(struct.pack('IHHII', 16 + len(body), 16, 0x605, 1, 0) + body)
        number = struct.unpack('i', netlink.recv(4096)[16:20])[0]
        if number:
            raise OSError(-number, '')
attempt('add a link by netlink', add_link)
attempt('a tunnel', lambda: opened('/dev/net/tun', os.O_RDWR))
attempt('forwarding', lambda: opened('/proc/sys/net/ipv4/ip_forward'))
""",
    ),
    Attack(
        "dns", ("namespaces",), own_kernel=False,
        code=r"""
for name in ('example.org', 'metadata.google.internal', 'localhost.example.org'):
    attempt(name, lambda: socket.getaddrinfo(name, 80))
attempt('a server', lambda: [l for l in open('/etc/resolv.conf') if l.startswith('nameserver')])
""",
    ),
    Attack(
        "raw_and_unusual_sockets", ("seccomp", "capabilities"), own_kernel=False,
        code=r"""
for name, family, kind, protocol in (('raw', 2, 3, 1), ('raw 6', 10, 3, 58), ('ping', 2, 2, 1), ('packet', 17, 3, 0x300), ('packet datagram', 17, 2, 0x300),
                                     ('netlink audit', 16, 3, 9), ('vsock', 40, 1, 0), ('sctp', 2, 1, 132), ('dccp', 2, 6, 33), ('mptcp raw', 2, 3, 262)):
    def make():
        with socket.socket(family, kind, protocol) as one:
            if name.startswith('netlink'):
                one.bind((0, 1))  # a multicast group, which needs a capability
                one.send(bytes(16))
                raise PermissionError(1, '')
            if name in ('sctp', 'dccp'):
                raise OSError(97, '') if one.connect_ex(('192.0.2.1', 1)) else None
    attempt(name, make)
""",
    ),
)  # fmt: skip
