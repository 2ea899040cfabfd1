"""A network as lm-eval sees it: its wrapper for transformers' models, around one that all ranks have.

lm-eval splits the documents of a task over processes, and then they run different numbers of forwards: ZeRO-3, which
gathers weights inside each of them, would wait forever, and a task with fewer documents than ranks ends with an error.
So here lm-eval sees one process on each rank, with all documents. What takes the time, the log-likelihoods, is divided
over the ranks below it, so that each runs as many forwards as every other; what a network generates, all ranks
generate.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Request = tuple[Any, list[int], list[int]]  # (what it is for, tokens of the context, tokens whose likelihood is asked)
Answer = tuple[float, bool]  # (log-likelihood in nats, whether greedy decoding would give these tokens)


class SharedNetwork(HFLM):
    """Answers lm-eval's requests with a network. Its calls are collective, with the same requests on every rank.

    Args:
        model: an engine or a transformers model, in evaluation mode.
        tokenizer: of the network. It stays as it is.
        batch_size: rows of a forward.
        max_length: tokens that the network is given at most; None = what its configuration allows.
        of_run: whether relora_ds trained the network: then a text begins behind EOS, as all documents did in training.
            Otherwise it begins as the tokenizer has it: behind BOS where calls add one, else behind EOS.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int | None,
        of_run: bool,
    ):
        begins_with_bos = not of_run and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        super().__init__(
            _Callable(model),
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it may get a padding token
            max_length=max_length,
            batch_size=batch_size,
            softmax_dtype=torch.float32,  # sums of bf16 would lose the third digit
            add_bos_token=False if of_run else None,
            prefix_token_id=None if begins_with_bos else tokenizer.eos_token_id,
        )
        initialized = dist.is_initialized()
        self._place, self._places = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of texts; lm-eval cuts them into windows and passes batches of these on."""
        rows: int = self.batch_size
        self.batch_size_per_gpu = rows * self._places
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = rows

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Answer this rank's share of the requests, and return everyone's answers."""
        if self._places == 1:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        mine = _share(requests, self._place, self._places)
        answers = super()._loglikelihood_tokens([requests[number] for number in mine], disable_tqdm, override_bs)
        everyones: list[Any] = [None] * self._places
        dist.all_gather_object(everyones, dict(zip(mine, answers, strict=True)))
        found = {number: answer for of_one in everyones for number, answer in of_one.items()}
        return [found[number] for number in range(len(requests))]


def _share(requests: Sequence[Request], rank: int, ranks: int) -> list[int]:
    """Return the numbers of a rank's requests, which take as many rows of forwards as those of every other rank.

    Requests that differ in nothing but their last token share a row. Neighbours in length go to different ranks.
    """
    rows = defaultdict(list)
    for number, (_, context, continuation) in enumerate(requests):
        rows[(*context, *continuation[:-1])].append(number)
    in_order = [rows[tokens] for tokens in sorted(rows, key=len)]
    mine = in_order[rank::ranks]
    if len(mine) < len(in_order[::ranks]):  # rank 0's
        mine.append(in_order[0])
    return [number for row in mine for number in row]


class _Callable:
    """What lm-eval calls of a network. No module: it would tie the weights of one again."""

    def __init__(self, model: Any):
        self._model, self._module = model, getattr(model, "module", model)
        self.device, self.config = model.device, self._module.config

    def __call__(self, input_ids: Tensor) -> Any:
        return self._model(input_ids=input_ids)

    def generate(self, **arguments: Any) -> Tensor:
        return self._module.generate(**arguments)
