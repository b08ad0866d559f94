"""The start-up check that a forward pass runs each steered layer once.

Some models run their layers in a loop, several times for each token. A layer is steered whenever it runs: what is
added would be added as often, receipts would say once, and the other checks would see the last run alone. So this one
comes first. That a layer runs at all is seen by the canaries (`startup_check`).

The pass runs without compiled code and without graphs, so that hooks are called. Where a model goes around them, or
fails in such a pass, there is no count, and nothing is refused.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.dummy_passes import dummy_forward, uncompiled
from trimtab.errors import SteeringError
from trimtab.wording import summary

logger = logging.getLogger("vllm.trimtab")


def require_single_runs(worker: Any, attachment: Attachment, is_v2: bool) -> None:
    """Raise `SteeringError` naming the classes of this rank's layers of which something that is steered runs more than
    once in a forward pass, and how often."""
    steered = {site: module for site, module in attachment.modules.items() if site.layer in attachment.layers}
    if not steered:
        return
    model = worker.model_runner.get_model()
    with _counted({model, *steered.values()}) as runs:
        try:
            forward = dummy_forward(worker, is_v2, eager=True)
            with uncompiled(model, whole=True):
                forward(2)
        except Exception:  # whatever a model does in a mode that it is not served in, it may serve in its own
            logger.debug("How often layers run was not measured: the pass for it failed", exc_info=True)
    passes = max(runs[model], 1)
    several: dict[int, dict[int, str]] = defaultdict(dict)  # how often, and then layers and their classes
    for site, module in steered.items():
        if runs[module] > passes:
            several[runs[module] // passes][site.layer] = attachment.layers[site.layer].name
    if several:
        names = ", ".join(dict.fromkeys(name for found in several.values() for name in found.values()))
        found = ", ".join(f"{times} times (layers {summary(sorted(found))})" for times, found in several.items())
        raise SteeringError(
            "model",
            f"layers of class {names} cannot be steered: one forward pass runs them {found}, and what is added once "
            "would be added in each run",
        )
    if skipped := [str(site) for site, module in steered.items() if not runs[module]]:
        logger.debug("How often layers run was not measured at %s", ", ".join(skipped))


@contextmanager
def _counted(modules: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """How often each of `modules` is called."""
    runs: Counter[nn.Module] = Counter()

    def count(module: nn.Module, _: Any) -> None:
        runs[module] += 1

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(count).remove)
        yield runs
