"""Certificates and keys for tests of https, made when they are needed."""

from __future__ import annotations

from pathlib import Path


def write_tls_files(folder: Path) -> None:
    """one.crt and one.key, for 127.0.0.1; ca.crt, which vouches for them; other.key; encrypted.key."""
    import trustme  # not where GPUs are tested
    from cryptography.hazmat.primitives import serialization

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.crt")
    one, other = (authority.issue_cert("127.0.0.1", "localhost") for _ in range(2))
    (folder / "one.crt").write_bytes(b"".join(blob.bytes() for blob in one.cert_chain_pems))
    one.private_key_pem.write_to_path(folder / "one.key")
    other.private_key_pem.write_to_path(folder / "other.key")
    key = serialization.load_pem_private_key(one.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    (folder / "encrypted.key").write_bytes(encrypted)
