"""Where an agent touches the world: disk, runtimes, sockets, processes."""
