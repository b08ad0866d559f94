"""Train the demonstration model: a small Llama and its tokenizer, on reviews sampled from the repository's grammar.

    python tools/train_demo_model.py --output src/trimtab/demo/model

Everything is seeded; with the same torch build and thread count the same weights come out. Prints the held-out loss and
the share of sampled sentences that the grammar parses, and fails where that share is below 95 %.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.demo.grammar import headers, measure, sample_review, split_sentences

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
)
MAX_TOKENS = 256
PARSED_AT_LEAST = 0.95


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.monotonic()

    rng = random.Random(args.seed)
    texts = [sample_review(rng).text for _ in range(args.reviews)]
    held_out = [sample_review(random.Random(f"held out {args.seed} {i}")).text for i in range(500)]
    tokenizer = train_tokenizer(texts[:10_000], args.vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads // 2,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)

    train(model, [encode(tokenizer, text) for text in texts], args, rng)
    loss = held_out_loss(model, [encode(tokenizer, text) for text in held_out])
    sentences = sample_sentences(model, tokenizer)
    shares = measure(sentences)
    print(f"held-out loss {loss:.4f} nats per token ({time.monotonic() - began:.0f} s)")
    print(
        f"{shares.parsed:.1%} of {shares.sentences} sampled sentences parse; of those {shares.positive:.1%} positive, "
        f"{shares.formal:.1%} formal"
    )

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{sum(f.stat().st_size for f in args.output.iterdir()) / 2**20:.2f} MiB in {args.output}")
    if shares.parsed < PARSED_AT_LEAST:
        print(f"only {shares.parsed:.1%} of sentences parse, below {PARSED_AT_LEAST:.0%}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reviews", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="reviews per step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--noise", type=float, default=0.5, help="largest offset, as a share of the stream's norm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocabulary", type=int, default=1648)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=352)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    return parser.parse_args()


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every text begins with <bos>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [*tokenizer.encode(text)[: MAX_TOKENS - 1], tokenizer.eos_token_id]


def train(model: LlamaForCausalLM, documents: list[list[int]], args: argparse.Namespace, rng: random.Random) -> None:
    """AdamW with a short warm-up and a cosine to zero, over batches of reviews of similar length."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    batches = [batch for _ in range(args.epochs) for batch in length_batches(documents, args.batch, rng)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=len(batches) + 1, pct_start=0.05, anneal_strategy="cos"
    )
    model.train()
    began, recent = time.monotonic(), 0.0
    for step, batch in enumerate(batches, 1):
        with offset_stream(model, len(batch), args.noise, rng):
            loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0:
            print(f"step {step}/{len(batches)}  loss {recent:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


@contextmanager
def offset_stream(model: LlamaForCausalLM, batch: int, largest: float, rng: random.Random) -> Iterator[None]:
    """Add one random direction per review to the stream leaving a random layer, the same at each of its tokens.

    A model of a hundred dimensions that has never seen its stream displaced loses its grammar when it is steered; one
    trained like this keeps it, as large models do. The directions are random, so none of them means anything.
    """
    layers = model.model.layers
    layer = layers[rng.randrange(len(layers) - 1)]
    lengths = torch.tensor([rng.uniform(0, largest) for _ in range(batch)]).view(-1, 1, 1).to(model.device)
    directions = torch.randn(batch, 1, model.config.hidden_size).to(model.device)

    def displace(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        size = output.detach().square().mean().sqrt()  # of one number of the stream, so that lengths are shares
        return output + lengths * size * directions

    handle = layer.register_forward_hook(displace)
    try:
        yield
    finally:
        handle.remove()


def length_batches(documents: list[list[int]], size: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Batches of documents of similar length (little padding), in random order."""
    order = list(documents)
    rng.shuffle(order)
    pools = [sorted(order[i : i + 20 * size], key=len) for i in range(0, len(order), 20 * size)]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    rng.shuffle(batches)
    yield from batches


def next_token_loss(model: LlamaForCausalLM, documents: list[list[int]]) -> torch.Tensor:
    """Mean cross-entropy per token, in nats; the padding on the right is after every real token and so never seen."""
    width = max(map(len, documents))
    tokens = torch.tensor([document + [0] * (width - len(document)) for document in documents]).to(model.device)
    labels = torch.tensor([document + [-100] * (width - len(document)) for document in documents]).to(model.device)
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: list[list[int]]) -> float:
    total = tokens = 0.0
    for begin in range(0, len(documents), 50):
        batch = documents[begin : begin + 50]
        count = sum(len(document) - 1 for document in batch)
        total += next_token_loss(model, batch).item() * count
        tokens += count
    return total / tokens


@torch.no_grad()
def sample_sentences(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, copies: int = 8) -> list[str]:
    """Complete sentences of sampled reviews, from every neutral header."""
    prompts = headers() * copies
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    outputs = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=100)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [sentence for text in texts for sentence in split_sentences(text) if sentence[-1] in ".!"]


if __name__ == "__main__":
    raise SystemExit(main())
