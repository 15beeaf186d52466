"""The node agent: shards, runtimes, sessions, ingress, command line."""

__version__ = "0.1.0"
