"""A process that has imported vLLM, which takes 7 s of CPU, and runs scripts, each in a fork of itself.

It is given a socket that listens, and the process whose end is its own. A connection brings one job, as a line of JSON,
and takes back the id of the fork and then, if it comes to an end of its own, its exit code. What was imported here, and
the kernels of the tests' platform, are all that a script finds done: no engine was ever made, and no plugin of trimtab
loaded.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn


def main(listener: socket.socket, run: int) -> None:
    # Names that are imported when they are asked for.
    from transformers import LlamaForCausalLM  # noqa: F401
    from trimtab_vllm_cpu.kernels import replace_kernels
    from vllm import LLM, SamplingParams  # noqa: F401
    from vllm.platforms import current_platform

    from trimtab import SteeredModel  # noqa: F401

    # Kernels once for all forks: each time takes 0.5 s, through every name of every module.
    current_platform.register_triton_kernel_overrides()
    replace_kernels()
    # An engine's start and its end collect garbage seven times, 0.4 s each over all that was imported here. This stays,
    # and what engines would freeze at their start and free at their end is their own.
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None

    signal.signal(signal.SIGCHLD, _forget)
    while listener in select.select([listener, run], [], [])[0]:
        connection, _ = listener.accept()
        line = connection.makefile().readline()
        if line.endswith("\n") and os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run(json.loads(line), connection)
        connection.close()


def _forget(*_: object) -> None:
    """Let forks that ended be gone: who asked for one waits for that."""
    with suppress(ChildProcessError):  # there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _run(job: dict[str, Any], connection: socket.socket) -> NoReturn:
    """Become the process of one script, with an environment, a folder, a log and an end of its own."""
    os.setsid()
    connection.sendall(os.getpid().to_bytes(4, "little"))
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in enumerate((nothing, log, log)):
        os.dup2(source, descriptor)
    os.environ.clear()
    os.environ.update(job["environment"])
    tempfile.tempdir = None  # that of the environment
    os.chdir(job["folder"])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    code = 1
    try:
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        with suppress(OSError):  # nobody may wait for it
            connection.sendall(code.to_bytes(4, "little"))
        os._exit(code)  # never back into the parent's loop


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), os.pidfd_open(int(sys.argv[2])))
