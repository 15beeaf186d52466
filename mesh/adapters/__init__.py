"""Where the mesh touches the world: clocks, logs, links, the wire schema."""
