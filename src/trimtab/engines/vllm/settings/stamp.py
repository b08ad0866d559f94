"""A steered engine's configuration is checked and stamped once, where it is made; every process compares the stamp."""

import hashlib
import json
from typing import Any

from trimtab.engines.vllm.settings.config import SteeringSettings, stamped
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.engines.vllm.settings.refusals import require_steerable
from trimtab.engines.vllm.settings.travelling import Travelling
from trimtab.errors import SteeringError
from trimtab.version import __version__, code_version


def prepare_config(vllm_config: Any) -> None:
    """Check the new configuration of a steered engine, and stamp it.

    Raises `SteeringError` where this engine cannot be steered as asked.
    """
    require_steerable(vllm_config)
    stamp_config(vllm_config)


def stamp_config(vllm_config: Any) -> None:
    """Stamp a configuration, whatever else of it cannot be steered. Raises `SteeringError` for bad settings."""
    given = vllm_config.additional_config
    settings = stamped(vllm_config, SteeringSettings.parse(given[SETTINGS_KEY]))
    plain = settings.model_dump(mode="json", exclude_none=True)
    vllm_config.additional_config = Travelling({**given, SETTINGS_KEY: plain})
    vllm_config.additional_config.settings = settings


def stamped_settings(vllm_config: Any) -> SteeringSettings:
    """The settings of a steered engine whose configuration passed `prepare_config`, with the content of their files.

    Raises `SteeringError` for one that did not pass, or passed in a process with another trimtab or other files.
    """
    settings = SteeringSettings.of(vllm_config)
    assert settings is not None, "asked of an engine that is not steered"
    stamp = settings.stamp or {}
    if stamp.get("code") != code_version():
        raise SteeringError(
            SETTINGS_KEY,
            f"the configuration was prepared by trimtab {stamp.get('trimtab', 'of no known version')} with code "
            f"{str(stamp.get('code'))[:12]}, this process has {__version__} with code {code_version()[:12]}: "
            "install the same one wherever vLLM runs",
        )
    return settings.read_files()


def stamp_digest(vllm_config: Any) -> str:
    """Names all that the stamp of a steered configuration says: nodes may make theirs on their own."""
    settings = SteeringSettings.of(vllm_config)
    told = json.dumps(None if settings is None else settings.stamp, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
