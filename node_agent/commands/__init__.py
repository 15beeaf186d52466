"""Subcommands of ``mesh``. Importing one costs nothing: what is heavy is imported when it runs."""
