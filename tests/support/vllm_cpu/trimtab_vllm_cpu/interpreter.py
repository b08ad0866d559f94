"""Triton's interpreter, less what it does again at every launch of a kernel."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace


@cache
def hasten() -> None:
    """Make interpreted kernels of this process run in half their time.

    The interpreter replaces the whole of `triton.language` before each launch and puts it back afterwards: here it
    stays replaced, where nothing compiles a kernel. It also computes every sum and product of integers once more in 64
    bits, to find overflows.
    """
    from triton import language
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"language": language, "core": language.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    named, known = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)  # pointers have no hash
    interpreter._get_np_dtype = lambda dtype: (known if type(dtype) is language.dtype else named)(dtype)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
