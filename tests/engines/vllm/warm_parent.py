"""A process that has imported vLLM, which takes 7 s of CPU, and runs each scenario in a fork of itself.

It reads one job per line of its standard input, as JSON, and answers each with the exit code of its fork. What it has
imported, and the kernels of the tests' platform, are all that a scenario finds done: no engine was ever made here, and
no plugin of trimtab loaded.
"""

import atexit
import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

SCENARIOS = Path(__file__).parent / "scenarios"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
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

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.close()
            _run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _run(job: dict[str, Any]) -> NoReturn:
    """Become the process of one scenario, with an environment, a folder, a log and an end of its own."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in enumerate((nothing, log, log)):
        os.dup2(source, descriptor)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    script = SCENARIOS / f"{job['script']}.py"
    sys.argv = [str(script), *job["arguments"]]
    sys.path[0] = str(SCENARIOS)
    code = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
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
        os._exit(code)  # never back into the parent's loop


if __name__ == "__main__":
    main()
