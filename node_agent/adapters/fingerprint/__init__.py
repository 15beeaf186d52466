"""What this machine is: one probe a file, folded together in ``machine.py``."""
