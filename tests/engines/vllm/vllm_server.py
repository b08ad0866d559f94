"""For server tests: a tiny model with a tokenizer, its oracle, and a real `vllm serve` process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm_harness import Fork

LAYERS, WIDTH, VOCABULARY = 4, 64, 256

KEY = "a-secret-key"

# Turns on the routes that take tokens. vLLM 0.26 always has them, and no such flag.
SCALE_OUT = ["--enable-scale-out"] if (Path(find_spec("vllm").origin).parent / "entrypoints/launchers").exists() else []


def make_model(path: Path) -> None:
    """A random Llama whose tokens are words, `w3` to `w255`, with a chat template that joins the messages."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
        model.lm_head.weight[:3] = 0  # never the most likely: texts hold words alone
    model.save_pretrained(path)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w3"
    fast.save_pretrained(path)


class Oracle:
    """Greedy decoding by Transformers, a plain hook on each layer adding what the phase of each position asks for."""

    def __init__(self, path: Path) -> None:
        self._model = LlamaForCausalLM.from_pretrained(path).float().eval()

    def words(
        self,
        prompt: str,
        count: int,
        prefill: Mapping[int, np.ndarray] | None = None,
        decode: Mapping[int, np.ndarray] | None = None,
    ) -> str:
        """`count` words after `prompt`; `prefill` and `decode` map a layer to what is added where it ends."""
        first, then = prefill or {}, decode or {}
        boundary = len(prompt.split())
        return self._words(prompt, count, lambda layer: self._hook(boundary, first.get(layer), then.get(layer)))

    def words_where(
        self, prompt: str, count: int, added: Mapping[int, np.ndarray], chosen: Callable[[list[int], int], bool]
    ) -> str:
        """The same where `chosen` says, of all tokens so far and the position of one, whether it is steered."""
        return self._words(prompt, count, lambda layer: self._chosen_hook(added.get(layer), chosen))

    def _words(self, prompt: str, count: int, hook: Callable[[int], Any]) -> str:
        tokens = self._tokens = [int(word[1:]) for word in prompt.split()]
        boundary = len(tokens)
        handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(self._model.model.layers)]
        try:
            for _ in range(count):  # without a KV cache: every position is computed under its own phase, every time
                with torch.no_grad():
                    logits = self._model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                tokens.append(int(logits.argmax()))
        finally:
            for handle in handles:
                handle.remove()
        return " ".join(f"w{token}" for token in tokens[boundary:])

    def _chosen_hook(self, added: np.ndarray | None, chosen: Callable[[list[int], int], bool]):
        def hook(module, args, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for position in range(hidden.shape[1]):
                if added is not None and chosen(self._tokens, position):
                    hidden[:, position] += torch.from_numpy(np.asarray(added, dtype=np.float32))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    @staticmethod
    def _hook(boundary: int, prefill: np.ndarray | None, decode: np.ndarray | None):
        def hook(module, args, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            if prefill is not None:
                hidden[:, :boundary] += torch.from_numpy(np.asarray(prefill, dtype=np.float32))
            if decode is not None:
                hidden[:, boundary:] += torch.from_numpy(np.asarray(decode, dtype=np.float32))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook


@contextmanager
def serving(
    model: Path, *flags: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[httpx.Client]:
    """A client of a forked server of its own, which ends with the block."""
    server = Server(model, *flags, log=log, environment=environment, forked=True)
    server.wait()
    try:
        with server.client() as client:
            yield client
    finally:
        server.stop()


class Server:
    """A `vllm serve` process on the CPU, with model runner V1.

    It starts as a user starts it, or is `forked` from a process that has imported vLLM, which takes 8 s of CPU less.
    """

    def __init__(
        self,
        model: Path,
        *flags: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        forked: bool = False,
    ) -> None:
        # Bound until the server has ended, so that nobody is given this port while the server starts. Both set
        # SO_REUSEADDR, and only the server listens.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        port = self._port.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        settings = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENGINE_READY_TIMEOUT_S": "3600",  # a busy machine is no fault
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # an engine in a new interpreter takes 8 s of imports
            **(environment or {}),
        }
        settings.pop("VLLM_PLUGINS", None)
        program = Path(sys.executable).parent / "vllm"
        arguments = [
            "serve", str(model), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY,
            "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32",
            "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16", *flags,
        ]  # fmt: skip
        self.process: psutil.Process
        if forked:
            self.process = psutil.Process(Fork("v1", program, arguments, settings, Path.cwd(), log).pid)
            return
        with log.open("wb") as output:
            self.process = psutil.Popen([program, *arguments], stdout=output, stderr=subprocess.STDOUT, env=settings)

    def wait(self, timeout: float = 1800, processes: int = 1) -> None:
        """Return once all API server `processes` answer; raises with the end of the log if they do not."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not self._ended():
            try:
                started = self.log.read_text(errors="replace").count("Application startup complete")
                if started >= processes and httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        tail = self.log.read_text(errors="replace")[-6000:]
        self.stop()
        raise RuntimeError(f"the server did not start:\n{tail}")

    def client(self) -> httpx.Client:
        """A client that knows the key."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=600)

    def stop(self, timeout: float = 300) -> list[str]:
        """Ask the server to end; returns the command lines of processes that outlived it, which are then killed."""
        self._port.close()
        if self._ended():
            return []
        family = self.process.children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except psutil.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        left = []
        for process in alive:
            try:
                left.append(" ".join(process.cmdline()))
                process.kill()
            except psutil.NoSuchProcess:
                continue
        return left

    def _ended(self) -> bool:
        try:
            self.process.wait(0)
        except psutil.TimeoutExpired:
            return False
        return True
