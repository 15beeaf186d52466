"""What should run where: snapshot, placement, routing."""
