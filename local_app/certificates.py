"""The local app's TLS certificates: a certificate authority whose key is not kept, and the AWS emulator's certificate."""

from pathlib import Path
from typing import NamedTuple


class Certificates(NamedTuple):
    """PEM files. Clients trust `authority` (AWS_CA_BUNDLE); the server uses `chain` and `key`."""

    authority: Path
    chain: Path
    key: Path


def certificates(folder: Path) -> Certificates:
    """Return the paths of the certificates in `folder`, which may not exist yet."""
    return Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")


def make_certificates(folder: Path, host: str) -> Certificates:
    """Make the certificates of a server that listens on `host`, an address or a name."""
    import trustme

    files = certificates(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = trustme.CA(organization_name="Tunedrop on this machine")
    # Docker's containers reach this machine by the last name.
    server = authority.issue_cert(*{host, "localhost", "127.0.0.1", "host.docker.internal"})
    # The authority last: when it exists, all files exist.
    files.key.touch(0o600)
    server.private_key_pem.write_to_path(files.key)
    server.cert_chain_pems[0].write_to_path(files.chain)
    authority.cert_pem.write_to_path(files.authority)
    return files
