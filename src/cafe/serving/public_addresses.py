"""What is a network address, and which are public, so that a server may connect to one that a stranger names.

The tables are those of IANA's registries of special-purpose addresses. They are written out because `ipaddress` knows
others in each version of Python.
"""

import ipaddress

_INNER_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # a provider's own network, behind which its customers share an address
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # the metadata of a virtual machine, at an address that looks public
        "169.254.0.0/16",  # link-local, with the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocols' own, with the metadata of one more cloud
        "192.0.2.0/24",  # for examples
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",  # for benchmarks
        "198.51.100.0/24",  # for examples
        "203.0.113.0/24",  # for examples
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
]
# All public addresses are in one block; within it, these are not, or carry an IPv4 address to anywhere.
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_INNER_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocols' own, with Teredo
        "2001:db8::/32",  # for examples
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",
        "3fff::/20",  # for examples
    )
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # how networks without IPv4 write its addresses


def is_address(host: str) -> bool:
    """Tell an IP address in its usual form from a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """Return whether an address belongs to the public internet; what is no address does not."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = _embedded_ipv4(parsed)
        if embedded is None:
            return parsed in _PUBLIC_IPV6 and not any(parsed in network for network in _INNER_IPV6)
        parsed = embedded
    return not any(parsed in network for network in _INNER_IPV4)


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address to which an IPv6 address leads; None if it is one of its own."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped
