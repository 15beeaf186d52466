"""Real agents, the real model, and something that breaks in mid-answer."""
