"""Certificates of an institution in place of the authority of the federation, and connections through a proxy."""

import asyncio

import pytest
import torch
import trustme
from proxy import Proxy
from sites import Served, experiment, write_tables

from atoll.base.errors import RunError, UsageError
from atoll.data import csv
from atoll.net import identity, join
from atoll.net.client import Membership
from atoll.net.home import ServerHome
from atoll.net.identity import Files
from atoll.net.join import join_federation
from atoll.net.site import MemoryChain, Prepared

SETTINGS = {"model": "softmax", "recipe": "fedavg(lr=0.5, batch=10)", "numerics": "fused", "report": "false"}


def files(folder, authority, name, *hosts):
    """The files of an identity under an authority."""
    cert = authority.issue_cert(*hosts)
    cert.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / f"{name}.key").chmod(0o600)
    (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    authority.cert_pem.write_to_path(folder / "institution.pem")
    return Files.read(folder / f"{name}.pem", folder / f"{name}.key", folder / "institution.pem")


def described(folder):
    """The path of the input of tables that are written into a folder."""
    write_tables(folder)
    given = csv(folder / "all.csv", target="ill", by="site").split().described()
    (folder / "input.json").write_bytes(given.encode())
    return str(folder / "input.json")


def test_an_institution_has_its_own_certificates(tmp_path):
    """The alternative name decides; a token registers the identity key; no certificate is issued."""
    ours = trustme.CA()
    it = experiment(**SETTINGS, clients=2, rounds=1)
    it = Served(tmp_path, it, schema=described(tmp_path), files=files(tmp_path, ours, "server", "127.0.0.1"))
    at = ServerHome.open(it.home, serve=False)
    tokens = {n: at.invite(n, it.address, f"DNS:{n}.example", 1).text() for n in ("north", "south")}
    north, south = (files(tmp_path, ours, n, f"{n}.example") for n in tokens)

    def fails(name, error, text, token=tokens["north"], **options):
        with pytest.raises(error, match=text):
            join_federation(token, tmp_path / name, str(tmp_path / "north.csv"), once=True, **options)

    fails("plain", UsageError, "certificates of an institution")
    fails("stranger", UsageError, "certificates of an institution", files=files(tmp_path, ours, "x", "x.example"))
    fails("south-with-the-token-of-north", UsageError, "certificates of an institution", files=south)
    with pytest.raises(RunError, match="not of this federation"):
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        join_federation(
            tokens["north"], tmp_path / "foreign", str(tmp_path / "north.csv"),
            files=files(theirs, trustme.CA(), "north", "north.example"),
        )  # fmt: skip
    it.invite = tokens.get
    it.join("north", tmp_path / "north.csv", files=north)
    it.join("south", tmp_path / "south.csv", files=south)
    results = it.wait()
    assert (results["north"], results["south"], len(results["server"].reports)) == (0, 0, 1), results
    assert all(record.identity is not None and not record.pinned for record in at.database.clients())
    assert not (tmp_path / "north" / "certificate.pem").exists()
    assert Membership.open(tmp_path / "north").files == north
    at.close()


def test_a_site_behind_a_proxy_enrols_and_works(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    it = experiment(**{**SETTINGS, "model": "mlp"}, clients=1, rounds=2)
    with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_address[1]}")
        it = Served(tmp_path, it, schema=described(tmp_path))
        it.join("north", tmp_path / "north.csv")
        results = it.wait()
    assert results["north"] == 0 and len(results["server"].reports) == 2, results
    assert set(proxy.asked) == {it.address} and len(proxy.asked) >= 3  # enrolment, channel, blobs and uploads


def test_a_proxy_that_refuses_is_an_error_and_one_without_a_way_is_tried_again(tmp_path, monkeypatch):
    class Waits(Exception):
        pass

    def notify(facts):
        raise Waits(facts["reason"])

    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    token = identity.new_token(["server.example.org:4433"], bytes(32), "f", "north", 1 << 33).text()
    for answer, error in (("407 Proxy Authentication Required", RunError), ("502 Bad Gateway", Waits)):
        with Proxy(answer=answer) as proxy, pytest.raises(error, match=answer[:3]):
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_address[1]}")
            join_federation(token, tmp_path / "north", "digits", once=True, notify=notify)


def test_three_files_make_an_identity(tmp_path):
    ours = files(tmp_path, trustme.CA(), "site", "site.example")
    assert Files.read(None, None, None) is None
    with pytest.raises(UsageError, match="all three"):
        Files.read(ours.certificate, None, ours.authority)
    with pytest.raises(UsageError, match="give no identity"):
        Files.read(ours.authority, ours.key, ours.authority)
    (tmp_path / "site.key").chmod(0o644)
    with pytest.raises(UsageError, match="0600"):
        Files.read(*ours)


def test_a_further_token_renews_the_identity_of_a_home_and_ends_its_memory(tmp_path, monkeypatch):
    tokens = [identity.new_token(["a.example:1"], bytes(32), "f", "north", 1 << 33) for _ in range(2)]
    enrolled = []

    async def enrol(token, home, notify, files=None):
        enrolled.append(token)
        made = Membership(home, token.addresses, "f", "north", token=identity.secret_hash(token.secret).hex())
        made.save()
        return made

    monkeypatch.setattr(join, "enrol", enrol)
    member = lambda token: asyncio.run(join._member(token, tmp_path, lambda facts: None, None))  # noqa: E731
    first = member(tokens[0].text())
    first.epoch = 7
    first.save()
    chain = MemoryChain.open(tmp_path)
    chain.begin("run")
    chain.prepare(Prepared(bytes(16), None, b"body", {"codec/error": torch.zeros(1, 2)}))
    chain.settle((bytes(16),))
    assert member(tokens[0].text()) == member(None) and MemoryChain.open(tmp_path).number == 1  # the same token
    assert member(tokens[1].text()).epoch == 7 and enrolled == tokens
    again = MemoryChain.open(tmp_path)
    assert (again.run, again.memory, again.number) == (None, {}, 0)
    assert Membership.open(tmp_path).token == identity.secret_hash(tokens[1].secret).hex()
