"""Where the scheduler will touch the world."""
