"""Certificates of the local app: its own authority, whose key nobody keeps, and what that signed for the AWS emulator."""

from pathlib import Path
from typing import NamedTuple


class Certificates(NamedTuple):
    """Files in PEM. `authority` is what a client trusts (AWS_CA_BUNDLE); the other two are the server's."""

    authority: Path
    chain: Path
    key: Path


def certificates(folder: Path) -> Certificates:
    """Return where the certificates of `folder` lie, whether or not they are there."""
    return Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")


def make_certificates(folder: Path, host: str) -> Certificates:
    """Make certificates for a server that listens on `host`, an address or a name."""
    import trustme

    files = certificates(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = trustme.CA(organization_name="Tunedrop on this machine")
    # The last name is the one by which Docker's containers know this machine.
    server = authority.issue_cert(*{host, "localhost", "127.0.0.1", "host.docker.internal"})
    # The server's files first: who finds an authority finds everything.
    server.private_key_pem.write_to_path(files.key)
    server.cert_chain_pems[0].write_to_path(files.chain)
    authority.cert_pem.write_to_path(files.authority)
    return files
