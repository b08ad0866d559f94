"""What Triton would compile for a launch, found out without a GPU: recorded launches, keys and ahead-of-time builds."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


class RecordedKernel:
    """Stands where a kernel stood and notes the keyword arguments of each launch, with Triton's key for it."""

    def __init__(self, kernel: Any, compute_capability: int = 90) -> None:
        self.kernel = kernel
        self.arg_names = kernel.arg_names
        self.__name__ = kernel.__name__
        self.target = GPUTarget("cuda", compute_capability, 32)
        self.backend = make_backend(self.target)
        self.binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        self.launches: list[dict[str, Any]] = []
        self.device_caches: dict[int, tuple[dict[str, bool], ...]] = {0: ({},)}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[0] >= 1

        def launch(**arguments: Any) -> None:
            self.launches.append(arguments)
            _, specialization, options = self.binder(**arguments)
            self.device_caches[0][0][str(specialization) + str(options)] = True

        return launch

    @property
    def keys(self) -> set[str]:
        return set(self.device_caches[0][0])

    def build(self, arguments: dict[str, Any], compute_capability: int) -> Any:
        """Compile the variant of this launch for another architecture, as Triton does at a first launch."""
        target = GPUTarget("cuda", compute_capability, 32)
        backend = make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(**arguments)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, options, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=parsed.__dict__)


@contextlib.contextmanager
def recorded(module: Any, name: str) -> Iterator[RecordedKernel]:
    """Replace the kernel `name` of `module` by a recorder."""
    kernel = getattr(module, name)
    recorder = RecordedKernel(kernel)
    setattr(module, name, recorder)
    try:
        yield recorder
    finally:
        setattr(module, name, kernel)


def machine_code(compiled: Any) -> list[str]:
    """The instructions of the cubin."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?) *;", _cuobjdump(compiled, "-sass"))


def loads_before_a_wait(code: list[str]) -> int:
    """Loads after the first branch, up to the next branch or to an instruction that reads what one of them brings."""
    first = next(number for number, line in enumerate(code) if " BRA " in line)
    count, loaded = 0, set[int]()
    for line in code[first + 1 :]:
        if "BRA" in line:
            break
        target, _, sources = line.partition(",")
        if loaded & {int(number) for number in re.findall(r"\bR(\d+)", sources)}:
            break
        if "LDG" in line:
            count += 1
            register = int(target.rpartition(" R")[2])
            loaded |= set(range(register, register + (4 if ".128" in target else 1)))
    return count


def resource_usage(compiled: Any) -> dict[str, int]:
    """Registers, stack and local bytes per thread, read from the cubin."""
    report = _cuobjdump(compiled, "-res-usage")
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    assert set(usage) == {"REG", "STACK", "LOCAL"}, report
    return usage


def _cuobjdump(compiled: Any, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
