"""The front end of an engine is made once, from its configuration, in the process that takes requests."""

from typing import Any

from trimtab.engines.vllm.frontend.admission import FrontEnd, Monitor
from trimtab.engines.vllm.frontend.start_log import log_start
from trimtab.engines.vllm.settings.config import SteeringSettings, model_sites
from trimtab.serving.admin_key import admin_key
from trimtab.serving.metrics import metrics
from trimtab.serving.registry import ProbeRegistry, VectorRegistry, shared_directory
from trimtab.vectors.content import short_name


def build_front_end(vllm_config: Any) -> FrontEnd | None:
    """The front end of an engine with this configuration; None where steering is not configured.

    Raises `SteeringError` for bad settings, vector files, default spec or administrator's key.
    """
    settings = SteeringSettings.of(vllm_config)
    if settings is None:
        return None
    admin_key()  # one that cannot be sent stops the start
    directory = shared_directory()
    registry = VectorRegistry(settings.start_vectors, directory)
    probes = ProbeRegistry(settings.start_probes, None if directory is None else directory / "probes")
    counters = metrics()
    counters.vectors(len(registry.vectors()))
    model, gate = model_sites(vllm_config, settings), settings.start_monitor
    monitor = Monitor(gate, settings.monitor.describe(gate)) if settings.monitor and gate else None
    served = short_name(str(getattr(vllm_config.model_config, "model", "")))
    drafts = int(getattr(getattr(vllm_config, "speculative_config", None), "num_speculative_tokens", None) or 0)
    front_end = FrontEnd(model, registry, settings.default, counters, probes, monitor, settings.start_norms, drafts)
    log_start(front_end, settings, served)
    return front_end
