"""Several threads: calls that need one model wait for each other, and what is global is as it was after the last."""

from contextlib import ExitStack
from threading import Thread

import torch
from oracle import Addition
from torch import nn

from trimtab.engines.transformers import SteeredModel
from trimtab.instrument.layer_replay import evaluating

PROMPT = [5, 17, 3, 44, 9]
PUSH = Addition("post_block", (1,), torch.randn(32, generator=torch.Generator().manual_seed(1)), scale=4.0)
SPEC = {"interventions": [PUSH.spec()]}


def test_what_another_thread_asks_of_a_model_that_is_being_steered_comes_after(llama) -> None:
    steered, other = SteeredModel(llama), SteeredModel(llama)
    wanted = steered.generate([PROMPT], SPEC, max_new_tokens=4)
    plain = other.generate([PROMPT[:1]], max_new_tokens=4)
    (read,) = other.activations([PROMPT[:1]], [(1, "post_block")])
    got: list[object] = []
    threads = [
        Thread(target=lambda: got.append(other.generate([PROMPT[:1]], max_new_tokens=4))),
        Thread(target=lambda: got.append(other.activations([PROMPT[:1]], [(1, "post_block")]))),
    ]

    def interrupt(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if threads[0].ident is None:
            for thread in threads:
                thread.start()
                thread.join(0.5)  # long enough to get in, where nothing keeps it out
        return scores

    assert steered.generate([PROMPT], SPEC, max_new_tokens=4, logits_processor=[interrupt]) == wanted
    for thread in threads:
        thread.join()
    (answer,) = (item for item in got if item == plain)
    assert answer == plain
    (after,) = next(item for item in got if item is not answer)
    assert all((after[site] == read[site]).all() for site in read)


def test_compiled_code_is_on_again_once_overlapping_calls_are_over() -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, _example: object) -> object:
        compiled.append(graph)
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend)
    first, second = ExitStack(), ExitStack()
    first.enter_context(evaluating(nn.Linear(1, 1)))
    second.enter_context(evaluating(nn.Linear(1, 1)))
    first.close()
    double(torch.ones(2))
    assert compiled == []
    second.close()
    double(torch.ones(2))
    assert len(compiled) == 1
