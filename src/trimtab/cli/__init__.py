"""The command line: `trimtab demo`, `generate`, `extract`, `probe`, `inspect` and `doctor`.

Commands import what they need when they run, so that `trimtab --help` does not wait for torch. A refusal is one line on
stderr and a non-zero exit code.
"""

import sys
from typing import Annotated

import typer

from trimtab.cli.demo import demo
from trimtab.cli.doctor import doctor
from trimtab.cli.extract import extract
from trimtab.cli.failure import one_line
from trimtab.cli.generate import generate
from trimtab.cli.inspect import inspect
from trimtab.cli.probe import probe
from trimtab.version import __version__

app = typer.Typer(
    help="Activation steering per request and per token, in stock vLLM and in Transformers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, generate, extract, probe, inspect):
    app.command()(command)
# What it does not know are flags of `vllm serve`, which vLLM's own parser reads.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(doctor)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"trimtab {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        return
    raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run the command line on `arguments` (default: those of the process) and return its exit code."""
    try:
        code = app(sys.argv[1:] if arguments is None else arguments, standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 1
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        typer.echo(f"trimtab: {line}", err=True)
        code = getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 0
