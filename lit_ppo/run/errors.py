"""An error that ends the command with a one-line message."""


class CommandError(Exception):
    """Ends the command with its message and exit code, without a traceback."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
