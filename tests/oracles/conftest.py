"""What the libraries of this folder miss, and the tiny Llama that they steer.

Left out are aisteer360, steerability and vllm-lens, which pip does not find ("No matching distribution found");
easysteer, whose package (0.0.1.dev0) holds no code; and LM-Steer, which is no package.
"""

import logging
import sys
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
from side_by_side import Llama, llama
from torch import nn

# repeng 0.4.0 names a type in annotations that NumPy 2 has dropped.
if not hasattr(np, "float_"):
    np.float_ = np.float64  # type: ignore[attr-defined]

# pyreft 0.1.0 imports `datasets` for sets of training examples. There are none here, and pyarrow would come with it.
# Transformers looks for it as well: its trainer, which pyreft imports, is imported before there is one.
if "datasets" not in sys.modules:
    import transformers.trainer  # noqa: F401

    sys.modules["datasets"] = nothing = ModuleType("datasets")
    nothing.Dataset = nothing.load_dataset = None  # type: ignore[attr-defined]

# sae_lens 6.54.12 imports all that it trains and evaluates with. Its autoencoders alone need TransformerLens' points
# for hooks, which do nothing where nobody hooks. So its folder is named here, and its first file is not run.
if "sae_lens" not in sys.modules and (found := find_spec("sae_lens")) is not None:
    package, points, rooted = (
        sys.modules.setdefault(name, ModuleType(name))
        for name in ("sae_lens", "transformer_lens.hook_points", "transformer_lens.HookedTransformer")
    )
    sys.modules.setdefault("transformer_lens", ModuleType("transformer_lens"))
    package.__path__, package.__spec__ = list(found.submodule_search_locations or ()), found
    package.logger, package.__version__ = logging.getLogger("sae_lens"), version("sae-lens")  # type: ignore[attr-defined]
    points.HookPoint = nn.Identity  # type: ignore[attr-defined]
    rooted.HookedRootModule = type("Root", (nn.Module,), {"setup": lambda self: None})  # type: ignore[attr-defined]


@pytest.fixture
def model() -> Llama:
    """A model of its own for each test: some libraries change the one that they are given."""
    return llama()
