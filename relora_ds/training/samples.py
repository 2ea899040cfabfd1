"""What the network writes: continuations of the same few prompts at every evaluation.

A loss says how good a network is, a text says what it can do: words, then agreement, then a thread. Each new
token costs one whole forward: no cache of keys and values, so that the one way works for every model, for wrapped
layers and at every ZeRO stage. Every rank takes part, in the same number of forwards, because ZeRO-3 gathers
weights inside each of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PROMPT_TOKENS, NEW_TOKENS = 16, 32
TEMPERATURE, TOP_K = 0.8, 40  # greedy decoding of a young network repeats itself from the second line on


@dataclass(frozen=True)
class Sample:
    """A prompt and what the network wrote after it, both as text."""

    prompt: str
    text: str


def first_documents(tokens: np.ndarray, eos_id: int, num: int, seq_len: int) -> Tensor:
    """Prompts: the beginnings of the first `num` documents that are long enough, `[<= num, length]` int64.

    The length is 16 tokens, or what half a sequence, or the longest of the documents, has.

    Args:
        tokens: 1-D token ids with `eos_id` after every document; the first million of them are looked at.
    """
    tokens = tokens[:1_000_000]
    ends = np.append(np.flatnonzero(tokens == eos_id), len(tokens))
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    length = min(PROMPT_TOKENS, seq_len // 2, int(lengths.max()))
    rows = [tokens[start : start + length] for start in starts[lengths >= length][:num]] if length else []
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(len(rows), length))


@torch.no_grad()
def continuations(model, prompts: Tensor, *, num_tokens: int, seed: int, device: torch.device) -> Tensor:
    """`[rows, length + num_tokens]` int64 on CPU: the prompts and what `model` continues them with. Collective.

    Tokens are drawn from the 40 most likely ones at temperature 0.8. The generator is made here from `seed`, so
    the same weights write the same text, and no other random number of the process changes. The model's mode is
    left as it was.

    Args:
        model: a causal network: a callable engine or module that returns an object with `logits`.
        prompts: `[rows, length]`, the same on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, length = prompts.shape
    # One shape for all forwards: what is not written yet stands to the right, where a causal network does not look.
    ids = torch.cat([prompts, torch.zeros(rows, num_tokens, dtype=torch.int64)], dim=1).to(device)
    training = model.training
    model.eval()
    for at in range(length, length + num_tokens):
        logits = model(input_ids=ids).logits[:, at - 1].float().cpu() / TEMPERATURE
        best, choice = logits.topk(min(TOP_K, logits.shape[-1]))
        # A diverged network has no probabilities; its samples are its most likely tokens.
        weights = best.softmax(-1).nan_to_num(nan=1.0)
        drawn = torch.multinomial(weights, 1, generator=generator)
        ids[:, at] = choice.gather(1, drawn).squeeze(1).to(device)
    model.train(training)
    return ids.cpu()


def draw_samples(
    model, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, *, seq_len: int, seed: int, device: torch.device
) -> list[Sample]:
    """Continue `prompts` (of `first_documents`) by at most 32 tokens each, as text. Collective."""
    if not len(prompts):
        return []
    length = prompts.shape[1]
    ids = continuations(model, prompts, num_tokens=min(NEW_TOKENS, seq_len - length), seed=seed, device=device)
    return [_decoded(tokenizer, row, length) for row in ids.tolist()]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> Sample:
    new = ids[length:]
    if tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id)]
    prompt, whole = str(tokenizer.decode(ids[:length])), str(tokenizer.decode(ids[:length] + new))
    # Decoded alone, the new tokens would lose the space or the bytes that tie them to the prompt.
    return Sample(prompt, whole[len(prompt) :] if whole.startswith(prompt) else str(tokenizer.decode(new)))
