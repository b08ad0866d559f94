"""What the engine core of a steered engine checks: its workers before they run, and each request as it arrives.

Called by `patches.core`; each function does nothing for an engine without steering.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

from trimtab.engines.vllm.bad_request import refuse
from trimtab.engines.vllm.carried import MARK, Decoded, carried, checked
from trimtab.engines.vllm.settings.config import SteeringSettings, model_sites
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY, is_configured
from trimtab.engines.vllm.settings.stamp import stamp_digest, stamped_settings
from trimtab.errors import SteeringError
from trimtab.program.spans import Spans
from trimtab.sites import ModelSites


def check_request(core: Any, request: Any) -> None:
    """Read and check what an `EngineCoreRequest` carries. Raises a `SteeringError` that refuses the request alone."""
    params = request.sampling_params
    if params is None or (served := served_by(core)) is None:
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
    if (spans := read.steering.spans) is not None:
        _check_prompt(spans, request.prompt_token_ids, request.prompt_embeds)
    if read is given:
        return params
    # Callers may use their sampling parameters again: they are not to find our form in them. Only one attribute
    # changes, so a shallow copy is enough.
    params = copy(params)
    params.extra_args = {**params.extra_args, SETTINGS_KEY: read}
    return params


def _check_prompt(spans: Spans, token_ids: Sequence[int] | None, embeddings: Any) -> None:
    """Raise `SteeringError` where spans are those of another prompt than the one that they came with."""
    length = len(embeddings if token_ids is None else token_ids)
    if spans.prompt_length != length:
        raise SteeringError(
            SETTINGS_KEY,
            f"was placed on a prompt of {spans.prompt_length} tokens and came with one of {length}: give each request "
            "its spec, not what another one carried",
        )
    if spans.decided_by_tokens and embeddings is not None:
        raise SteeringError(SETTINGS_KEY, "is decided by tokens, and the prompt has embeddings in their place")


_UNMARKED = (
    "this engine is steered, and a request came from a front end that never loaded trimtab, which would drop what "
    "requests say about steering: call vllm.plugins.load_general_plugins() in the process that takes requests, before "
    "it makes its engine client"
)


def check_workers(vllm_config: Any, executor: Any) -> None:
    """Ask each worker whether its model is steered. Raises `SteeringError` if one is not."""
    if not is_configured(vllm_config):
        return
    try:
        attached = executor.collective_rpc("trimtab_attached")
    except (AttributeError, NotImplementedError) as error:
        raise SteeringError(SETTINGS_KEY, f"the workers do not know trimtab ({error}); install it there") from error
    stamp = stamp_digest(vllm_config)
    if others := [rank for rank, own in enumerate(attached) if own and own != stamp]:
        raise SteeringError(
            SETTINGS_KEY,
            f"workers {others} were configured in another way than the engine: give each node the same steering "
            "settings and files and, where their devices differ in memory, `max_rows` or a size as `table_memory`",
        )
    if not all(attached):
        missing = [rank for rank, done in enumerate(attached) if not done]
        reasons = sorted({reason for known in executor.collective_rpc("trimtab_problems") for reason in known})
        why = f": trimtab does not know this vLLM: {'; '.join(reasons)}" if reasons else ""
        raise SteeringError(SETTINGS_KEY, f"the models of workers {missing} were loaded without being steered{why}")


def served_by(core: Any) -> tuple[SteeringSettings, ModelSites, Decoded] | None:
    """What the engine of an `EngineCore` serves, read once, and what it has lately decoded. Raises `SteeringError`."""
    if "_trimtab_served" not in core.__dict__:
        core._trimtab_served = None
        if is_configured(core.vllm_config):
            settings = stamped_settings(core.vllm_config)
            core._trimtab_served = settings, model_sites(core.vllm_config, settings), Decoded()
    served: tuple[SteeringSettings, ModelSites, Decoded] | None = core._trimtab_served
    return served
