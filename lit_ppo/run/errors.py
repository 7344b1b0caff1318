"""The error that ends the command with one line."""


class CommandError(Exception):
    """What the command cannot do, said in one line; it ends the command without a traceback."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
