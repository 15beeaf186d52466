"""The mesh's vocabulary, its peer state machines and its transport."""
