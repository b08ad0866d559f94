"""SteeredModel: a Transformers causal LM whose prompts can each be steered differently in one batch."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from trimtab.engines.transformers.arguments import Names, Reader, resolve_all, resolve_monitor, resolve_norms
from trimtab.engines.transformers.calls import Call, check_not_compiled, generate_steered
from trimtab.engines.transformers.groups import layer_devices
from trimtab.engines.transformers.opening_check import check_places
from trimtab.engines.transformers.prompts import Prompt, encode, pad
from trimtab.engines.transformers.reading import decoder_of, read_batch
from trimtab.engines.transformers.results import Generation
from trimtab.errors import SteeringError
from trimtab.instrument.hookmap import map_hook_points
from trimtab.instrument.layers import find_decoder_layers
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.serving.receipt import receipt_of
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.vectors.content import model_name
from trimtab.vectors.dose import says_norms
from trimtab.vectors.probe import Probe
from trimtab.vectors.stream_norms import doubt_of_model
from trimtab.vectors.values import as_site
from trimtab.vectors.vector import SteeringVector

logger = logging.getLogger("trimtab")

SHARED_WITH_TOKENIZER = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class SteeredModel:
    """Steers a causal LM per prompt and per token.

    The model is instrumented only while a call runs: between calls, and after `close`, its modules, hooks, buffers and
    weights are what they were. Use as a context manager, or call `close`. Calls from several threads that
    need the same model wait for each other; nothing else may run it meanwhile.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        vectors: Mapping[str, SteeringVector] | None = None,
        probes: Mapping[str, Probe] | None = None,
        gates: int = 4,
        monitor: Mapping[str, Any] | None = None,
        norms: str | Path | SteeringVector | None = None,
        think_tags: Sequence[str | Sequence[int]] | None = None,
    ) -> None:
        """Find and prove the hook points of `model`, a Transformers causal LM (see docs/hook-points.md).

        `tokenizer` may be None where all prompts are token ids. `vectors` and `probes` are the names that specs may
        use, `gates` is how many different gates a phase of one spec may have. `monitor`, written as a gate is, stands
        before all steering of new tokens that is behind no gate, from its probe's site on (see docs/gates.md). `norms`
        is a vector or its file, whose metadata hold norms of this model's stream: for doses of vectors without them.
        `think_tags`, such as `("<think>", "</think>")`, are texts, or token ids, between which the model thinks: for
        `section`, where its vocabulary does not tell.
        The layers may lie on several devices. Raises SteeringError where they cannot be found or are offloaded, where a
        short generation shows that prompt and new tokens cannot be told apart, for a monitor that cannot be one, and
        for norms that are not of this model.
        """
        check_not_compiled(model)
        self._homes = layer_devices(find_decoder_layers(model))
        self._map = map_hook_points(model)
        self._model, self._tokenizer = model, tokenizer
        self._decoder = decoder_of(model, self._map.decoder.path)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._reader = Reader.of(tokenizer, think_tags, self._vocabulary)
        self._vectors: dict[str, SteeringVector] = {}
        self._probes: dict[str, Probe] = {}
        self._gates = gates
        self._monitor: ResolvedGate | None = None
        self._norms = resolve_norms(norms, self._map)
        if self._norms is not None:
            self._warn_of_other_model("norms", self._norms.base_model)
        self._closed = False
        for name, vector in (vectors or {}).items():
            self.register(name, vector)
        for name, probe in (probes or {}).items():
            self.register(name, probe)
        self._monitor = resolve_monitor(monitor, self._probes, self._map)
        if hasattr(model, "generate"):  # a model without a head can be read, and that is all
            check_places(model, self._map, self._decoder, self._homes)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        tokenizer: Any = None,
        vectors: Mapping[str, SteeringVector] | None = None,
        probes: Mapping[str, Probe] | None = None,
        gates: int = 4,
        monitor: Mapping[str, Any] | None = None,
        norms: str | Path | SteeringVector | None = None,
        think_tags: Sequence[str | Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load model and tokenizer with Transformers. `kwargs` go to `AutoModelForCausalLM.from_pretrained`."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if tokenizer is None:
            shared = {name: kwargs[name] for name in SHARED_WITH_TOKENIZER if name in kwargs}
            tokenizer = AutoTokenizer.from_pretrained(path_or_name, **shared)
        model = AutoModelForCausalLM.from_pretrained(path_or_name, **kwargs)
        return cls(
            model,
            tokenizer,
            vectors=vectors,
            probes=probes,
            gates=gates,
            monitor=monitor,
            norms=norms,
            think_tags=think_tags,
        )

    @property
    def model(self) -> Any:
        """The Transformers model itself."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self._tokenizer

    @property
    def sites(self) -> ModelSites:
        """Everything that can be steered and read in this model, and the gates that it serves."""
        return self._names.served_by(self._map)

    @property
    def _names(self) -> Names:
        return Names(self._vectors, self._probes, self._gates, self._monitor, self._norms)

    @property
    def refused_hook_points(self) -> Mapping[HookPoint, str]:
        """The hook points that this model does not have, each with the reason."""
        return MappingProxyType(self._map.refusals)

    @property
    def vectors(self) -> Mapping[str, SteeringVector]:
        """The named vectors."""
        return MappingProxyType(self._vectors)

    @property
    def probes(self) -> Mapping[str, Probe]:
        """The named probes."""
        return MappingProxyType(self._probes)

    def register(self, name: str, named: SteeringVector | Probe) -> None:
        """Let specs name a vector, or gates a probe, in place of any earlier one of its kind.

        Raises SteeringError for another width, the name of the monitor, and a probe at a site that this model does not
        have.
        """
        field = f"{'probes' if isinstance(named, Probe) else 'vectors'}[{name!r}]"
        if name == MONITOR_LABEL:
            raise SteeringError(field, "is what reports call the monitor: choose another name")
        if not isinstance(named, (SteeringVector, Probe)):
            raise SteeringError(field, f"is a {type(named).__name__}; want a SteeringVector or a Probe")
        vector = named.vector if isinstance(named, Probe) else named
        if vector.hidden_size != self.sites.hidden_size:
            raise SteeringError(field, f"has width {vector.hidden_size}; this model needs {self.sites.hidden_size}")
        if isinstance(named, Probe):
            if (reason := self._map.refusal(named.site)) is not None:
                raise SteeringError(field, f"is read at {named.site}: {reason}")
            self._probes[name] = named
        else:
            if says_norms(named):
                self._warn_of_other_model(field, named.metadata.base_model)
            self._vectors[name] = named

    def generate(
        self, prompts: Sequence[Prompt] | str, steering: Any = None, **generation_kwargs: Any
    ) -> list[Generation]:
        """Continue `prompts` (strings, lists of token ids, or messages of a chat), each under its own steering.

        `steering` is None, one spec for all prompts, or a list with a spec or None for each. A spec is a `Steering`,
        its plain dict or its JSON string. What its `where` says of texts and roles is looked for in each prompt; roles
        need messages. `generation_kwargs` are those of Transformers' `generate`; sampling, beam
        search and `num_return_sequences` work, and the n outputs of a prompt then stand side by side.
        Raises SteeringError for whatever cannot be honoured, naming the place in the input (`options.py` lists all
        options), and where the model runs tokens whose place in its prompt and answer cannot be known.
        """
        self._check_open()
        given = encode(prompts, self._tokenizer, self._vocabulary)
        rows = [prompt.ids for prompt in given]
        resolved = resolve_all(steering, given, self._names, self._map, self._reader)
        call = Call.of(self._model, self._tokenizer, generation_kwargs)
        filler = self._pad_token(call.pad_token, call.ends)
        batch = pad(rows, "left", filler, self._device)
        outputs, session = generate_steered(
            self._model, self._map, batch, resolved, call.padded_with(filler), homes=self._homes
        )

        results = []
        for index in range(len(outputs)):
            source = index * len(rows) // len(outputs)
            tokens = outputs.tokens(index)
            text = "" if self._tokenizer is None else self._tokenizer.decode(tokens, skip_special_tokens=True)
            gates = () if session is None else session.gate_uses(index, len(outputs))
            slots = () if session is None else session.slot_uses(index, len(outputs))
            prompt, fed = outputs.fed(index)
            results.append(
                Generation(
                    text,
                    tokens,
                    receipt_of(
                        resolved[source], prompt, fed + 1, gates=gates, slots=slots, tokens=rows[source] + tokens
                    ),
                    outputs.per_token("scores", index),
                    outputs.per_token("logits", index),
                )
            )
        return results

    def activations(
        self,
        prompts: Sequence[Prompt] | str,
        sites: Iterable[Site | tuple[int, str]],
        *,
        batch_size: int = 8,
    ) -> list[dict[Site, npt.NDArray[np.float32]]]:
        """The un-steered activations of each prompt: for every site an array [tokens, H] in float32, padding removed.

        Prompts are read `batch_size` at a time. Raises SteeringError for a site that the model does not have, by name
        and with the reason.
        """
        self._check_open()
        rows = [prompt.ids for prompt in encode(prompts, self._tokenizer, self._vocabulary)]
        wanted = [as_site(site) for site in sites]
        if not wanted or batch_size < 1:
            raise SteeringError("sites" if not wanted else "batch_size", "at least one is needed")
        results: list[dict[Site, npt.NDArray[np.float32]]] = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = pad(part, "right", self._pad_token(None, frozenset()), self._device)
            results.extend(read_batch(self._model, self._decoder, self._map, batch, wanted))
        return results

    def close(self) -> None:
        """Let go of the model, which is as it was before. Closing twice is no error."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    def _warn_of_other_model(self, field: str, base_model: str) -> None:
        if (doubt := doubt_of_model(base_model, model_name(self._model.config))) is not None:
            logger.warning("%s: %s", field, doubt)

    def _check_open(self) -> None:
        if self._closed:
            raise SteeringError("model", "this SteeredModel is closed")

    def _pad_token(self, configured: Any, ends: frozenset[int]) -> int:
        """What to fill padding with. It is masked and never steered, so any token of the vocabulary will do."""
        for token in (configured, getattr(self._tokenizer, "pad_token_id", None), *sorted(ends)):
            if token is not None and 0 <= int(token) < self._vocabulary:
                return int(token)
        return 0
