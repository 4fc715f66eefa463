"""What the command line reports in one line."""

__all__ = ["CliError"]


class CliError(Exception):
    """The user's request cannot be served; the message says why and what to do."""
