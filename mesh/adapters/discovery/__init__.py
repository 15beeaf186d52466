"""Directories of agents, one adapter a file; each serves ``mesh.discovery.Discovery``."""
