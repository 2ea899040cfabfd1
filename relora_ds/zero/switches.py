"""Switches of rows of A and columns of B on ZeRO's shards (SwitchLoRA, `lowrank.switching`).

    after an applied step   which vectors are switched follows from the seed, the step and the layer's name
    exchange                one sum over the ranks brings every rank the vectors that are involved: those of A and B
                            from the ranks with pieces of them, candidates from the host of the owner of W. Each element
                            comes from one rank, so the sum is exact
    switch                  every rank writes its pieces of the new vectors, masters and copies for forward, and adds to
                            its own W what the product lost
    reset                   the counterparts of what was switched begin Adam anew (`vectors.VectorAdamW`), at the next
                            step

W changes at nearly every step. To publish it from an fp32 master would send the whole weight each time, and to add to a
bf16 copy in place would round thousands of times in a run. So W is stored in fp32 on every rank (at ZeRO-3: pieces of
it), needs no master, and every rank adds the same product to it: no copy is ever rounded, and only vectors are sent.

There is nothing between the ranks and nothing pending between steps. A step that is skipped switches nothing, as the
number of applied steps stays. The first switches follow the first step.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.config.switch_config import SwitchLoRAConfig
from relora_ds.lowrank import switching
from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.switching import Turn
from relora_ds.zero.collect import gather_factors
from relora_ds.zero.frozen_master import FrozenWeights
from relora_ds.zero.shards import ShardView
from relora_ds.zero.vectors import Vector, VectorAdamW, column, read_vectors, row, write_vectors
from relora_ds.zero.verify_ranks import verify

VERIFIED_EVERY = 200  # steps


class Switching:
    """The candidates of an engine, and when their turn is. Collective: all ranks make every call.

    Args:
        adam: what DeepSpeed wraps.
        seed: with the layer's name and the step decides everything that is random.
        total_steps: of the run.

    Attributes:
        last_exchange: bytes that were summed over the ranks after the last step.
    """

    argument = "switching"  # of `initialize`

    def __init__(
        self,
        frozen: FrozenWeights,
        shards: ShardView,
        adam: VectorAdamW,
        config: SwitchLoRAConfig,
        *,
        seed: int,
        total_steps: int,
    ):
        self._frozen, self._shards, self._config = frozen, shards, config
        self._seed, self._total_steps = seed, total_steps
        self._layers, self.last_exchange = frozen.lowrank, 0
        # Vectors are numbered: of each layer A's rows, then B's columns. Counts by layer: switched of A, of B.
        self._numbers, end = {}, 0
        for name, layer in self._layers.items():
            self._numbers[name] = end
            end += 2 * layer.r
        self._resets = torch.zeros(end, dtype=torch.int64, device=frozen.device)
        adam.count_by_vector(shards.numbered(self._number, self._factors()), self._resets, config.freeze_steps)
        self._draw()

    @torch.no_grad()
    def begin(self) -> None:
        """Give A and B the values that they begin with, and W what keeps the function."""
        for name, layer in self._layers.items():
            old = gather_factors(self._shards, self._frozen, name, None)
            assert old is not None
            std_A, std_B = self._stds(layer)
            lora_A = switching.drawn(layer.r, layer.in_features, std_A, self._key(name, "A")).to(self._frozen.device)
            lora_B = switching.drawn(layer.out_features, layer.r, std_B, self._key(name, "B")).to(self._frozen.device)
            self._add(name, torch.cat([old[0], -lora_A]), torch.cat([old[1], lora_B], dim=1))
            self._shards.write(f"{name}.lora_A", lora_A)
            self._shards.write(f"{name}.lora_B", lora_B)

    @torch.no_grad()
    def after_step(self, t: int) -> None:
        """Switch what is due after the applied step number `t`.

        Raises:
            RuntimeError: from time to time, where ranks hold different bytes; names the first tensor.
        """
        self.last_exchange = 0
        if turns := self._due(t):
            self._shards.drop_gathered_copies()
            vectors, reset = self._exchange(turns), []
            for name, turn in turns.items():
                self._switch(name, turn, *vectors[name])
                first, r = self._numbers[name], self._layers[name].r
                reset += [first + r + i for i in turn.rows] + [first + i for i in turn.columns]
            step, _ = self._shards.adam_of(next(self._factors()))
            self._resets[torch.tensor(reset, device=self._resets.device)] = step
        if t % VERIFIED_EVERY == 0:
            verify(self._shards, self._frozen, {}, device=self._frozen.device, what="switches")

    def about(self) -> str:
        """Return the settings, as a text."""
        return repr(self._config)

    def held(self) -> dict[str, Tensor]:
        """Return the state of the layers that this rank owns by `LAYER/WHAT`, on the CPU; later steps leave it."""
        resets, found = self._resets.cpu(), {}
        for name in self._candidates:
            first, (rows, columns) = self._numbers[name], self._candidates[name]
            found[f"{name}/A"], found[f"{name}/B"] = rows.clone(), columns.clone()
            found[f"{name}/counts"] = torch.tensor(self._counts[name])
            found[f"{name}/resets"] = resets[first : first + 2 * self._layers[name].r].clone()
        return found

    def names(self) -> list[str]:
        """Return the names of what `held` returns on this rank."""
        return [f"{name}/{what}" for name in self._candidates for what in ("A", "B", "counts", "resets")]

    @torch.no_grad()
    def restore(self, read: Callable[[str], Tensor] | None) -> None:
        """Continue from what `held` returned, of the layers that this rank owns now; None: begin anew."""
        self._draw()
        self._resets.zero_()
        if read is None:
            return
        counts = torch.zeros(len(self._layers), 2, dtype=torch.int64, device=self._frozen.device)
        for name, own in zip(self._layers, counts, strict=True):
            if name in self._candidates:
                for candidates, what in zip(self._candidates[name], "AB", strict=True):
                    candidates.copy_(read(f"{name}/{what}"))
                own.copy_(read(f"{name}/counts"))
                first, resets = self._numbers[name], read(f"{name}/resets")
                self._resets[first : first + len(resets)] = resets.to(self._resets.device)
        dist.all_reduce(counts)
        dist.all_reduce(self._resets)
        self._counts = dict(zip(self._layers, counts.tolist(), strict=True))

    def _draw(self) -> None:
        """Draw the candidates of the owned layers, on the host: rows of A, and columns of B as rows."""
        self._counts = {name: [0, 0] for name in self._layers}
        self._candidates: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self._frozen.owned():
            layer, many = self._layers[name], self._num_candidates(name)
            std_A, std_B = self._stds(layer)
            self._candidates[name] = (
                switching.drawn(many, layer.in_features, std_A, self._key(name, "candidates of A")),
                switching.drawn(many, layer.out_features, std_B, self._key(name, "candidates of B")),
            )

    def _due(self, t: int) -> dict[str, Turn]:
        """Return what is switched after step `t`, by layer, and count it."""
        if t >= self._total_steps:
            return {}
        every = switching.interval(t, self._total_steps, first=self._config.interval, ratio=self._config.ratio)
        turns = {}
        for name, layer in self._layers.items():
            of_A, of_B = self._counts[name]
            key = self._key(name, str(t))
            turn = switching.turn_of(layer.r, self._num_candidates(name), (of_A, of_B), layer.r / every, key)
            self._counts[name] = [of_A + len(turn.rows), of_B + len(turn.columns)]
            if turn.pairs:
                turns[name] = turn
        return turns

    def _exchange(self, turns: dict[str, Turn]) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return the vectors that a turn involves, as rows, in fp32: of A, of B, and the candidates for A and for B."""
        trained, chosen = [], []
        for name, turn in turns.items():
            layer = self._layers[name]
            trained += [(len(turn.pairs), layer.in_features), (len(turn.pairs), layer.out_features)]
            chosen += [(len(turn.new_rows), layer.in_features), (len(turn.new_columns), layer.out_features)]
        sizes = [rows * columns for rows, columns in trained + chosen]
        buffer = torch.zeros(sum(sizes), device=self._frozen.device)
        parts = iter([part.view(shape) for part, shape in zip(buffer.split(sizes), trained + chosen, strict=True)])
        vectors = {name: [next(parts), next(parts)] for name in turns}
        for name, turn in turns.items():
            read_vectors(self._shards, f"{name}.lora_A", self._rows(name, turn.pairs), vectors[name][0])
            read_vectors(self._shards, f"{name}.lora_B", self._columns(name, turn.pairs), vectors[name][1])
        for name, turn in turns.items():
            vectors[name] += [next(parts), next(parts)]
            if name in self._candidates:
                for held, numbers, into in zip(
                    self._candidates[name], (turn.new_rows, turn.new_columns), vectors[name][2:], strict=True
                ):
                    into.copy_(held[numbers])
        # Where every rank has whole masters, candidates alone are sent.
        sent = buffer if self._shards.partitioned else buffer[sum(sizes[: len(trained)]) :]
        dist.all_reduce(sent)
        self.last_exchange = sent.nbytes
        return {name: (of_A, of_B, new_A, new_B) for name, (of_A, of_B, new_A, new_B) in vectors.items()}

    def _switch(self, name: str, turn: Turn, of_A: Tensor, of_B: Tensor, new_A: Tensor, new_B: Tensor) -> None:
        """Switch vectors of a layer, which `_exchange` has returned; they are used up."""
        rows, columns = ([turn.pairs.index(i) for i in numbers] for numbers in (turn.rows, turn.columns))
        if name in self._candidates:
            held_A, held_B = self._candidates[name]
            held_A[turn.new_rows], held_B[turn.new_columns] = of_A[rows].cpu(), of_B[columns].cpu()
        self._add(name, *switching.switch_(of_A, of_B.t(), rows, new_A, columns, new_B.t()))
        write_vectors(self._shards, f"{name}.lora_A", self._rows(name, turn.rows), new_A)
        write_vectors(self._shards, f"{name}.lora_B", self._columns(name, turn.columns), new_B)

    def _rows(self, name: str, numbers: list[int]) -> list[Vector]:
        return [row(i, self._layers[name].shape_of_A) for i in numbers]

    def _columns(self, name: str, numbers: list[int]) -> list[Vector]:
        layer = self._layers[name]
        return [column(i, torch.Size((layer.out_features, layer.r))) for i in numbers]

    def _add(self, name: str, down: Tensor, up: Tensor) -> None:
        """Add `s · up · down` to what this rank stores of a layer's W."""
        layer = self._layers[name]
        first, second = (down.t(), up.t()) if layer.transposed else (up, down)
        piece, start = self._frozen.stored_fp32(name)
        switching.add_part_(piece, start, layer.weight_shape[1], first, second, layer.scaling)

    def _number(self, name: str, indices: Tensor) -> Tensor:
        """Return the numbers of the vectors that elements of a factor belong to."""
        of, _, factor = name.rpartition(".")
        layer, first = self._layers[of], self._numbers[of]
        return first + indices // layer.in_features if factor == "lora_A" else first + layer.r + indices % layer.r

    def _factors(self) -> Iterator[str]:
        return (f"{name}.{factor}" for name in self._layers for factor in ("lora_A", "lora_B"))

    def _num_candidates(self, name: str) -> int:
        return min(self._layers[name].in_features, self._layers[name].out_features)

    def _stds(self, layer: LowRankLayer) -> tuple[float, float]:
        return switching.factor_stds(layer.out_features, layer.in_features, layer.r)

    def _key(self, name: str, what: str) -> str:
        return f"{self._seed}/{name}/switching/{what}"
