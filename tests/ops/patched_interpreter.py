"""Triton's interpreter, less what it does again at every launch. Import it where TRITON_INTERPRET was set before."""

from types import SimpleNamespace

from triton import language
from triton.runtime import interpreter

# Before each launch the interpreter replaces the whole of `triton.language`, and afterwards puts it back: half of the
# time of small kernels. Here it stays replaced, where nothing compiles a kernel.
interpreter._patch_lang(SimpleNamespace(__globals__={"language": language, "core": language.core}))
interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
