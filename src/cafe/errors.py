"""The one error a user's mistake raises: its message is a full sentence that names the file, record or field."""


class CafeError(Exception):
    """Wrong input. The command line prints the message alone and exits with status 1."""
