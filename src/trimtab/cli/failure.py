"""What went wrong, in one line: for the exceptions that a person's input can cause, and for no others."""

from trimtab.errors import SteeringError


class CommandError(Exception):
    """A command could not do what was asked; the message is for the person at the terminal."""


def one_line(error: Exception) -> str | None:
    """The message of an expected failure on one line, or None for a fault of the program, which keeps its traceback."""
    if hasattr(error, "format_message"):  # typer's usage errors; the class moved between its releases
        message = str(error.format_message())
        if (context := getattr(error, "ctx", None)) is not None:
            message = f"{message} (see {context.command_path} --help)"
    elif isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    elif isinstance(error, ModuleNotFoundError):
        message = f"needs the package {error.name!r}: install trimtab with its extra `transformers`"
    elif isinstance(error, (SteeringError, CommandError, OSError)):
        message = str(error)
    else:
        return None
    return " ".join(message.split())
