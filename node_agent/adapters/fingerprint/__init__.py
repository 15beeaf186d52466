"""What this machine is: one probe a file."""
