"""The recipe as one typed tree: what can be set, what may be in it, and what follows from it.

A `Literal` lists the choices, `Annotated` carries the rules of `rules`, and the text under a field explains it; the
reference page of the recipe is made of these. Field names are a contract with users' recipes and scripts.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from relora_ds.config import spelling
from relora_ds.config.curve import Schedule
from relora_ds.config.data_config import DataConfig
from relora_ds.config.matrix_config import ApolloConfig, FiraConfig, MuonConfig, ScaleConfig, SSTConfig
from relora_ds.config.names import METHODS, preset_names
from relora_ds.config.relora_config import ReLoRAConfig
from relora_ds.config.rules import MAX_TOKENS, FilePath, Integer, Names, Number, OneOf
from relora_ds.config.switch_config import SwitchLoRAConfig

ActivationCheckpointing = Literal["none", "full", "selective", "cheap", "low_rank", "inverted"]
ACTIVATION_CHECKPOINTING: tuple[str, ...] = get_args(ActivationCheckpointing)
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"]
ATTENTION: tuple[str, ...] = get_args(Attention)

# How one start treats the run directory. A recipe that is stored or extended must not repeat it: `overwrite` would
# delete the very run that stored it.
OF_ONE_START = ("resume", "overwrite")

# A recipe sets one of each pair. A source that sets one of them replaces the other one of the sources below it:
# `train.tokens=1e9` is all it takes to run a recipe of so many steps by tokens.
ONE_OF = (
    ("train.steps", "train.tokens"),
    ("train.batch_sequences", "train.batch_tokens"),
    ("model.preset", "model.name_or_path"),
)

# Other names of a key.
ALIASES = {
    "relora.modules_to_save": "relora.trainable_modules",
    "islands.outer.optimizer": "islands.outer_optimizer",
    "islands.outer.lr": "islands.outer_lr",
    "islands.outer.momentum": "islands.outer_momentum",
    "islands.link.address": "islands.address",
    "islands.link.timeout_s": "islands.timeout_s",
}

# Keys of earlier versions, which stand in the recipes of their runs, with the value that changed nothing: not read.
REMOVED = {"log.update_rank": "false"}


@dataclass(kw_only=True)
class ModelConfig:
    """Which network. Exactly one of `preset` and `name_or_path`."""

    preset: Annotated[str | None, OneOf(preset_names)] = None
    """A shipped LLaMA shape."""
    name_or_path: Annotated[str | None, FilePath()] = None
    """A model of the Hugging Face hub, a directory, or the JSON file of a configuration."""
    init: Literal["random", "pretrained"] = "random"
    """First weights: random, or those of `name_or_path`."""
    attn_implementation: Attention | str = "sdpa"
    """The implementation of attention in transformers, or `org/name` of a kernel on the hub."""
    use_liger_kernel: bool = False
    """Use the fused cross-entropy, norms and SwiGLU of liger-kernel; CUDA only."""


@dataclass(kw_only=True)
class LoRAConfig:
    """Method `lora` only; rank, alpha and targets come from `relora`."""

    base: Literal["none", "random", "warm_start"] = "none"
    """`none` = no W at all, `y = s·B·A·x` (the paper's LoRA baseline); `random` = a frozen random W; `warm_start` = the
    W that the warm start (or `init_from`) leaves behind."""


@dataclass(kw_only=True)
class CoLAConfig:
    """Methods `cola` and `cola_m` only: the network of `model` with factors in place of weights."""

    r: Annotated[int, Integer(1)] = 128
    """Rank of the factors, the same for every attention and feed-forward linear."""
    only_lr_activation: bool = False
    """Drop the feed-forward's own activation, so that the SiLU between the factors is the only one."""


@dataclass(kw_only=True)
class CRNetConfig:
    """Method `crnet` only: the network of `model`, each of whose layers adds to what the one before has computed."""

    r: Annotated[int, Integer(1)] = 96
    """Rank of the factors, the same for every attention and feed-forward linear after the first layer."""
    beta: Annotated[float, Number("above 0")] = 1.0
    """The factor of the layer before, as every linear begins with it."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length and batch. Exactly one of `steps` and `tokens`, and one of `batch_sequences` and `batch_tokens`."""

    steps: Annotated[int | None, Integer(1, example=8)] = None
    """Optimizer steps of the whole run, warm start included."""
    tokens: Annotated[int | None, Integer(1, most=MAX_TOKENS, example=8)] = None
    """Tokens of the whole run, sequences × `data.seq_len`; rounded up to whole steps."""
    batch_sequences: Annotated[int | None, Integer(1, example=8)] = None
    """Sequences per optimizer step, over all ranks."""
    batch_tokens: Annotated[int | None, Integer(1, example=8)] = None
    """Tokens per optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Integer(1)] = 8
    """Sequences of one forward on one rank."""


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and the learning-rate schedule."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps Adam's moments in 8 bit, by bitsandbytes: 2 bytes a weight instead of 8. Those of embeddings,
    and of partitions below 4096 elements, stay in fp32."""
    lr: Annotated[float, Number("above 0")] = 1e-3
    """Peak learning rate."""
    warm_start_lr: Annotated[float | None, Number("above 0", example=0.001)] = None
    """Peak learning rate of the warm start; null = `lr`."""
    matrix_lr: Annotated[float | None, Number("above 0", example=0.01)] = None
    """Peak learning rate of the weights that owners update (methods `fira`, `apollo`, `apollo_mini`, `scale`, `muon`,
    `sst`), in either phase; null = that of the rest."""
    warmup_steps: Annotated[int, Integer(0)] = 500
    """Steps of the linear warm-up at the start of a phase."""
    warm_start_warmup_steps: Annotated[int | None, Integer(0, example=500)] = None
    """Steps of the warm start's warm-up; null = `warmup_steps`."""
    schedule: Schedule = "cosine"
    """The curve after the warm-up, to which the learning rate climbs again after every restart: `cosine` and `linear`
    fall to `min_lr_ratio` at the end, `wsd` (warm-up, stable, decay) stays at the peak and falls linearly over the last
    `decay_steps`, `constant` stays at the peak. The warm start's curve spans the whole run and is cut at the
    transition: under `wsd` it has no decay."""
    decay_steps: Annotated[int | None, Integer(1, example=500)] = None
    """Steps of the decay at the end of `wsd`, after the last restart's warm-up; null = a tenth of the last phase."""
    min_lr_ratio: Annotated[float, Number("inside [0, 1]")] = 0.1
    """Where the curve ends, as a part of the peak."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's decay rates of the two moments."""
    eps: Annotated[float, Number("above 0")] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Number("0 or more")] = 0.0
    """Decoupled weight decay of matrices; norms and biases have none. In low-rank layers it acts on `W + s·B·A` as a
    whole: B decays, and so does the frozen W, through a factor that forward reads and a restart merges. A does not."""
    max_grad_norm: Annotated[float, Number("0 (no clipping) or more")] = 1.0
    """Clip the gradient's norm to this; 0 = no clipping. It is the norm over all that trains: low-rank factors,
    embeddings, head and norms. B's gradient is `s·G·Aᵀ`, where G is W's, so a value that suits full rank does not carry
    over."""


@dataclass(kw_only=True)
class EvalConfig:
    """When the validation loss is computed, and how many texts the network writes each time.

    There is always an evaluation at the end of each phase, so also of the run. A cycle without one has it directly
    after its restart.
    """

    every: Annotated[int | None, Integer(1, example=500)] = None
    """Steps between evaluations beside these; null = only these."""
    max_tokens: Annotated[int | None, Integer(2, most=MAX_TOKENS, example=1_000_000)] = None
    """About how many validation tokens an evaluation within a phase takes, spread over the split; null = all. An
    evaluation at a phase's end takes all."""
    samples: Annotated[int, Integer(0, most=1000)] = 1
    """Number of validation documents whose beginnings the network continues, shown with each evaluation."""
    tasks: Annotated[list[str], Names("[hellaswag, tasks/mine.yaml]")] = field(default_factory=list)
    """Tasks of lm-eval on which the network is evaluated when the run is complete: names, or paths of task files
    (.yaml); [] = none. They need the extra `tasks`."""
    task_files: Annotated[str | None, FilePath()] = None
    """A directory of task files, whose names `tasks` may use beside those of lm-eval."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: Annotated[int | None, Integer(1, example=500)] = None
    """Steps between checkpoints; null = only at the end."""
    keep_last: Annotated[int, Integer(1)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int | None, Integer(1, example=5000)] = None
    """Checkpoints at multiples of this number of steps are never deleted; null = only the newest are kept."""
    remote: str | None = None
    """URL of a directory in an object store, e.g. `s3://bucket/runs/mine`: checkpoints are uploaded there in the
    background, and `resume=auto` fetches what this machine has lost. Any protocol of fsspec whose package is installed
    (`s3fs`, `gcsfs`, `adlfs`, ...). Credentials come from the protocol's environment, never from a recipe."""
    remote_stop_s: Annotated[int, Integer(0)] = 20
    """Seconds that a run which was asked to stop waits for its last upload. Launchers kill 30 s after SIGTERM."""


@dataclass(kw_only=True)
class LogConfig:
    """What is written during the run."""

    every: Annotated[int, Integer(1)] = 10
    """Steps between log lines."""
    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go beside `metrics.jsonl`; [] = nowhere. All of them work offline."""


@dataclass(kw_only=True)
class GuardConfig:
    """When the run stops by itself, or goes back to a checkpoint."""

    max_bad_steps: Annotated[int, Integer(1)] = 10
    """Consecutive non-finite steps after which the run stops."""
    watchdog_seconds: Annotated[int, Integer(1)] = 1800
    """Seconds without a step after which the run is stopped as hanging."""
    spike_zscore: Annotated[float, Number("above 0")] = 8.0
    """Robust standard deviations above the median of the last losses that make a loss spike."""
    on_spike: Literal["report", "skip", "rollback"] = "report"
    """Report a spike only, skip the step, or go back to the newest checkpoint and continue with later data."""


@dataclass(kw_only=True)
class IslandsConfig:
    """Train as one of several islands, jobs of any size that exchange their updates at restarts only.

    They meet at a server: `relora islands serve`.
    """

    count: Annotated[int | None, Integer(1, most=9999, example=2)] = None
    """How many islands there are; null = the run is none."""
    index: Annotated[int, Integer(0, most=9998)] = 0
    """Which one this is, from 0. It decides what part of the data it trains on."""
    address: str | None = None
    """HOST:PORT of the server. The secret that all islands share is in the environment, `RELORA_ISLANDS_SECRET`."""
    sync_every: Annotated[int | None, Integer(1, example=500)] = None
    """Steps between exchanges where there are no restarts: of a full-rank run or warm start. Low-rank updates are
    exchanged at every restart (`relora.restart_every`)."""
    outer_optimizer: Literal["average", "nesterov"] = "nesterov"
    """What becomes of the mean of the updates: it is added to the weights (`average`), or goes through SGD with
    Nesterov momentum, as in DiLoCo. One momentum per weight, in fp32 on its owner's host."""
    outer_lr: Annotated[float | None, Number("above 0", example=0.7)] = None
    """Learning rate of the outer optimizer; null = 1 for `average`, 0.7 for `nesterov`."""
    outer_momentum: Annotated[float, Number("inside [0, 1)")] = 0.5
    """Momentum of `nesterov`. DiLoCo has 0.9, which has learned worse in our small networks."""
    compress: Literal["none", "bf16", "int8", "int4", "int2"] = "none"
    """How updates of embeddings, head, norms, and of full-rank training are sent. What rounding leaves out is added to
    the next update."""
    compress_factors: Literal["none", "bf16", "int8"] = "none"
    """How factors A and B are sent. What rounding leaves out of them is lost: the next ones span another subspace."""
    moments: Literal["keep", "reset"] = "keep"
    """What becomes of Adam's moments of these at an exchange. Those of A and B: `relora.optimizer_reset`."""
    timeout_s: Annotated[int, Integer(1)] = 600
    """Seconds that the others wait for an island, from when the first of them has arrived. They continue without
    it; it takes part again in a later exchange."""

    @property
    def outer(self) -> tuple[float, float]:
        """Learning rate and momentum of the outer optimizer."""
        if self.outer_optimizer == "average":
            return self.outer_lr or 1.0, 0.0
        return self.outer_lr or 0.7, self.outer_momentum


@dataclass(kw_only=True)
class Recipe:
    """Keys without a section."""

    method: Annotated[str, OneOf(lambda: METHODS)] = "relora"
    """How the network is trained: at full rank by AdamW (`full`), or by what owners of the weights do with whole
    gradients (`fira`, `apollo`, `apollo_mini`, `scale`, `muon`, `sst`); by a smaller network of as many parameters as
    `relora` would train (`control`); by low-rank updates (`lora`, `relora`, `galore`, `switchlora`); with two factors
    and an activation in place of every weight (`cola`, and `cola_m`, which recomputes more); or with two factors beside
    what the layer before has computed (`crnet`)."""
    seed: Annotated[int, Integer(0, most=2**64 - 1)] = 0
    """Decides the initial weights, the order of the data and what A becomes at restarts."""
    run_dir: Annotated[str | None, FilePath()] = None
    """The run directory; null = `runs/<recipe name>`."""
    resume: Annotated[str | bool, FilePath()] = False
    """`auto` = the newest checkpoint in `run_dir`, if there is one; or the path of a checkpoint or a run."""
    overwrite: bool = False
    """Delete the run that is in `run_dir`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the computation; `auto` = bf16 on CUDA devices that have it, else fp32."""
    deepspeed: Annotated[str, FilePath()] = "zero1"
    """A shipped DeepSpeed configuration's name, or the path of one."""
    compile: bool = False
    """Compile the layers with torch.compile, at ZeRO stages 0 to 2."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What the backward computes again instead of keeping it: whole layers (`full`), all but the outputs of attention
    and of every second large product (`selective`), all but those of attention and large products (`cheap`), or all but
    the products with a low-rank A, which are r wide (`low_rank`; `inverted` also finds what the layer before has
    computed, in the network of `crnet`)."""
    warm_start_steps: Annotated[int, Integer(0)] = 0
    """Steps of the warm start before the low-rank phase."""
    warm_start_method: Annotated[str, OneOf(lambda: METHODS)] = "full"
    """How the warm start trains. With a low-rank method no step of the run holds Adam's state of every weight. Both
    phases then read section `relora`, except for the values that the method itself sets (`galore`: its basis, and a
    restart every 200 steps). `lora` trains on the initial weights. The updates are merged when the warm start ends."""
    carry_moments: bool = False
    """Take Adam's moments of what trains in both phases over from the warm start, by name: those of embeddings, head
    and norms. Low-rank factors begin anew."""
    init_from: Annotated[str | None, FilePath()] = None
    """Begin from the weights of a run, a checkpoint or a Hugging Face model."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model or a tokenizer."""
    model: ModelConfig = field(default_factory=ModelConfig)
    relora: ReLoRAConfig = field(default_factory=ReLoRAConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    cola: CoLAConfig = field(default_factory=CoLAConfig)
    crnet: CRNetConfig = field(default_factory=CRNetConfig)
    fira: FiraConfig = field(default_factory=FiraConfig)
    apollo: ApolloConfig = field(default_factory=ApolloConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    switchlora: SwitchLoRAConfig = field(default_factory=SwitchLoRAConfig)
    sst: SSTConfig = field(default_factory=SSTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    islands: IslandsConfig = field(default_factory=IslandsConfig)

    @property
    def directory(self) -> Path:
        """The run directory, of a recipe that was read."""
        assert self.run_dir is not None, "reading a recipe fills it in"
        return Path(self.run_dir)

    @property
    def batch_sequences(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        if self.train.batch_sequences is not None:
            return self.train.batch_sequences
        assert self.train.batch_tokens is not None, "a recipe sets one of the two"
        return self.train.batch_tokens // self.data.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks: sequences × seq_len."""
        return self.batch_sequences * self.data.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, warm start included; `train.tokens` is rounded up to whole steps."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None, "a recipe sets one of the two"
        return -(-self.train.tokens // self.tokens_per_step)

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, without `resume` and `overwrite`, which are of one start only.

        `load_recipe` of it gives an equal Recipe but for these two.
        """
        return spelling.to_yaml({key: value for key, value in asdict(self).items() if key not in OF_ONE_START})
