"""What happens to a steered engine between its configuration and its requests, in the front end and the engine core.

Called by the patches of `patches.engine`; each function does nothing for an engine without steering.
"""

from copy import copy
from typing import Any

import trimtab
from trimtab.engines.vllm.carried import MARK, Decoded, carried, checked
from trimtab.engines.vllm.core.cache_keys import keep_keys
from trimtab.engines.vllm.frontend.requests import refuse
from trimtab.engines.vllm.patches.engine import require_supported
from trimtab.engines.vllm.plugin import Travelling
from trimtab.engines.vllm.settings.config import SteeringSettings, model_sites, stamped
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.engines.vllm.settings.refusals import require_steerable
from trimtab.errors import SteeringError
from trimtab.sites import ModelSites
from trimtab.version import code_version


def prepare_config(vllm_config: Any) -> None:
    """Check a new configuration and stamp it. Raises `SteeringError` where this engine cannot be steered as asked."""
    settings = SteeringSettings.of(vllm_config)
    if settings is None:
        return
    require_supported()
    require_steerable(vllm_config)
    given = vllm_config.additional_config
    vllm_config.additional_config = Travelling({**given, SETTINGS_KEY: stamped(vllm_config, settings)})


def stamped_settings(vllm_config: Any) -> SteeringSettings | None:
    """The settings of a configuration that passed `prepare_config`; None where steering is not configured.

    Raises `SteeringError` for one that did not pass, or passed in a process with another trimtab.
    """
    settings = SteeringSettings.of(vllm_config)
    if settings is None:
        return None
    stamp = settings.stamp or {}
    if stamp.get("code") != code_version():
        raise SteeringError(
            SETTINGS_KEY,
            f"the configuration was prepared by trimtab {stamp.get('trimtab', 'of no known version')} with code "
            f"{str(stamp.get('code'))[:12]}, this process has {trimtab.__version__} with code {code_version()[:12]}: "
            "install the same one wherever vLLM runs",
        )
    return settings


def check_request(core: Any, request: Any) -> None:
    """Read and check what an `EngineCoreRequest` carries. Raises a `SteeringError` that refuses the request alone."""
    params = request.sampling_params
    if params is None or (served := _served_by(core)) is None:
        return
    try:
        request.sampling_params = _checked_params(request, params, *served)
    except SteeringError as error:
        refuse(error)  # some versions tell the client what such an error says


def _checked_params(request: Any, params: Any, settings: SteeringSettings, model: ModelSites, recent: Decoded) -> Any:
    if MARK not in (params.extra_args or ()) and not getattr(request, "abort_immediately", False):
        raise SteeringError(SETTINGS_KEY, _UNMARKED)
    given = carried(params)
    if given is None:
        return params
    if getattr(request, "resumable", False):
        raise SteeringError(SETTINGS_KEY, "cannot be combined with resumable requests: where a prompt ends would move")
    read = checked(given, settings, model, recent)
    if read is given:
        return params
    # Callers may use their sampling parameters again: they are not to find our form in them. Only one attribute
    # changes, so a shallow copy is enough.
    params = copy(params)
    params.extra_args = {**params.extra_args, SETTINGS_KEY: read}
    return params


_UNMARKED = (
    "this engine is steered, and a request came from a front end that never loaded trimtab, which would drop what "
    "requests say about steering: call vllm.plugins.load_general_plugins() in the process that takes requests, before "
    "it makes its engine client"
)


def check_prefix_cache(core: Any) -> None:
    """See that a new engine core tells steered KV apart. Raises `SteeringError` if it does not."""
    if SteeringSettings.of(core.vllm_config) is not None:
        keep_keys(core)


def check_workers(vllm_config: Any, executor: Any) -> None:
    """Ask each worker whether its model is steered. Raises `SteeringError` if one is not."""
    if SteeringSettings.of(vllm_config) is None:
        return
    try:
        attached = executor.collective_rpc("trimtab_attached")
    except (AttributeError, NotImplementedError) as error:
        raise SteeringError(SETTINGS_KEY, f"the workers do not know trimtab ({error}); install it there") from error
    if not all(attached):
        missing = [rank for rank, done in enumerate(attached) if not done]
        reasons = sorted({reason for known in executor.collective_rpc("trimtab_problems") for reason in known})
        why = f": trimtab does not know this vLLM: {'; '.join(reasons)}" if reasons else ""
        raise SteeringError(SETTINGS_KEY, f"the models of workers {missing} were loaded without being steered{why}")


def _served_by(core: Any) -> tuple[SteeringSettings, ModelSites, Decoded] | None:
    """What the engine of an `EngineCore` serves, read once, and what it has lately decoded."""
    if "_trimtab_served" not in core.__dict__:
        settings = stamped_settings(core.vllm_config)
        core._trimtab_served = settings and (settings, model_sites(core.vllm_config, settings), Decoded())
    served: tuple[SteeringSettings, ModelSites, Decoded] | None = core._trimtab_served
    return served
