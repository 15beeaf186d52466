"""Prints a new Ed25519 key: the raw public key in hex on one line, then the private key as PKCS8 PEM.

Run as a process of its own: the cryptography package is needed once in a node's life and would
stay in the agent's memory (9 MB) for all of it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Draw and print."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    sys.stdout.write(key.public_key().public_bytes_raw().hex() + "\n" + pem.decode())


if __name__ == "__main__":
    main()
