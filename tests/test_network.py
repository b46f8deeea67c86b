"""The rules of the network: how they are read, and what they permit."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executions import network
from executions.network import Rules, parse


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org"),
        ("example.org.:443", "example.org:443"),
        ("*.Example.org", "*.example.org"),
        ("*", "*"),
        ("*:8443", "*:8443"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("straße.de", "xn--strae-oqa.de"),  # IDNA 2008; the older one would have read another domain
        ("аpple.com", "xn--pple-43d.com"),  # its first letter is Cyrillic
        ("ｅｘａｍｐｌｅ。org", "example.org"),
        ("10.1.2.0/24", "10.1.2.0/24"),
        ("127.0.0.1:5432", "127.0.0.1:5432"),
        ("10.0.0.0/8:5432", "10.0.0.0/8:5432"),
        ("::1", "::1"),
        ("[2001:DB8::/64]:443", "[2001:db8::/64]:443"),
        ("2001:db8::/64", "2001:db8::/64"),
        ("localhost:8080", "localhost:8080"),
        ("my_bucket.example.org", "my_bucket.example.org"),
    ],
)
def test_a_rule_is_read_once_into_one_form(typed, read):
    assert str(parse(typed)) == read
    assert parse(read) == parse(typed)


@pytest.mark.parametrize(
    "typed",
    [
        "", " ", "example.org ", "exa mple.org", "example.org\x00", "example.org\n", "example.org\x00.evil.com", "exa\u200bmple.org",
        "https://example.org", "example.org/path", "user@example.org", "user:pw@example.org", "example.org:", "example.org:0",
        "example.org:65536", "example.org:http", "example.org:٤٤٣", "example.org:80:80", "*example.org", "a.*.org", "**", "*.",
        "*.*", "*.10.0.0.1", "example..org", ".example.org", "-a.org", "a-.org", "..", ".", "a" * 64 + ".org", "a." * 130 + "org",
        "10.1.2.3/24", "10.1.2.0/33", "0.0.0.0/0", "::/0", "10.1", "0x7f.1", "0x7f000001", "2130706433", "0177.0.0.1",
        "127.0.0.1.", "fe80::1%eth0", "[::1", "::1]:80", "[]:80", "example.org;evil.org", "a,b", "%65xample.org", "a\\b", "☃☃\ud800.org",
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_a_sentence(typed):
    with pytest.raises(ValueError) as refused:
        parse(typed)

    assert str(refused.value).isascii()
    assert str(refused.value).endswith((".", "443."))


@given(st.text(max_size=40))
def test_whatever_is_typed_is_read_the_same_twice_or_refused(typed):
    try:
        rule = parse(typed)
    except ValueError:
        return

    assert str(rule).isascii()
    assert parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("rules", "host", "port", "permitted"),
    [
        ([], "example.org", 443, False),
        (["example.org"], "example.org", 443, True),
        (["example.org"], "EXAMPLE.org.", 80, True),
        (["example.org"], "example.org", 22, False),
        (["example.org:22"], "example.org", 22, True),
        (["example.org:22"], "example.org", 443, False),
        (["example.org"], "www.example.org", 443, False),
        (["example.org"], "notexample.org", 443, False),
        (["*.example.org"], "a.b.example.org", 443, True),
        (["*.example.org"], "example.org", 443, False),
        (["*.example.org"], "evilexample.org", 443, False),
        (["*"], "anything.at.all", 443, True),
        (["*"], "93.184.215.14", 443, True),
        (["*"], "10.0.0.1", 80, False),
        (["*"], "169.254.169.254", 80, False),
        (["*"], "::ffff:10.0.0.1", 80, False),
        (["*"], "::ffff:93.184.215.14", 80, False),
        (["*"], "64:ff9b::a00:1", 80, False),
        (["*"], "2002:a00:1::", 80, False),
        (["*"], "2606:4700::1", 443, True),
        (["10.1.2.0/24"], "10.1.2.9", 80, True),
        (["10.1.2.0/24"], "10.1.3.9", 80, False),
        (["10.1.2.0/24"], "::ffff:10.1.2.9", 80, False),
        (["10.1.2.0/24"], "a.name.in.it", 80, False),
        (["127.0.0.1:5432"], "127.0.0.1", 5432, True),
        (["127.0.0.1:5432"], "127.0.0.1", 80, False),
        (["::1"], "::1", 80, True),
    ],
)
def test_what_may_be_asked_for(rules, host, port, permitted):
    assert Rules(rules).permit(network.target(host), port) is permitted


@pytest.mark.parametrize(
    "host",
    [
        "",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "a b",
        "a\x00b",
        "a@b",
        "fe80::1%lo",
        "exämple.org",
        "[::1]",
        "a:b",
    ],
)
def test_an_odd_host_is_no_target(host):
    with pytest.raises(ValueError):
        network.target(host)


@pytest.mark.parametrize(
    ("rules", "asked", "covered"),
    [
        ([], "example.org", False),
        (["example.org"], "example.org", True),
        (["example.org"], "example.org:443", True),
        (["example.org:443"], "example.org", False),
        (["example.org:443", "example.org:80"], "example.org", True),
        (["*.example.org"], "*.a.example.org", True),
        (["*.a.example.org"], "*.example.org", False),
        (["*.example.org"], "*.example.org", True),
        (["*.example.org"], "example.org", False),
        (["*"], "*.example.org", True),
        (["*"], "*", True),
        (["example.org"], "*", False),
        (["*"], "8.8.8.0/24", True),
        (["*"], "10.0.0.0/8", False),
        (["*"], "8.0.0.0/5", False),  # 10.0.0.0/8 is within
        (["10.0.0.0/8"], "10.1.0.0/16", True),
        (["10.1.0.0/16"], "10.0.0.0/8", False),
        (["10.0.0.0/8"], "10.1.2.3:443", True),
    ],
)
def test_a_request_narrows_and_never_widens(rules, asked, covered):
    assert Rules(rules).cover(parse(asked)) is covered


def test_a_private_address_has_to_be_named_as_an_address():
    rules = Rules(["db.example.org:5432", "10.1.2.0/24:5432"])

    assert rules.name_address(ip_address("10.1.2.3"), 5432)
    assert not rules.name_address(ip_address("10.1.2.3"), 80)
    assert not rules.name_address(ip_address("10.9.9.9"), 5432)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.0.1", "198.18.0.1", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:1.2.3.4", "64:ff9b::1", "100::1", "2001::1", "2001:db8::1", "2002::1",
        "fc00::1", "fd00::1", "fe80::1", "ff02::1", "5f00::1",
    ],
)  # fmt: skip
def test_what_is_not_public(address):
    assert not network.is_public(ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700::1", "2a00:1450::1"])
def test_what_is_public(address):
    assert network.is_public(ip_address(address))
