"""The one error that a caller of trimtab sees when a request cannot be honoured."""


class SteeringError(ValueError):
    """A request, vector or setting that trimtab refuses.

    `field` is where the fault stands in the caller's own input (`interventions[1].scale`), `message` says what was
    given and what would be right. Every door turns it into its own refusal: `ValueError` in Python, HTTP 400 in a
    server, one line and exit code 1 on the command line.
    """

    def __init__(self, field: str, message: str) -> None:
        field, message = _sendable(field), _sendable(message)
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type["SteeringError"], tuple[str, str]]:
        return SteeringError, (self.field, self.message)  # engines send it from process to process


def _sendable(text: str) -> str:
    """`text` as any answer can carry it: keys may hold half a surrogate pair, for which UTF-8 has no bytes."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")
