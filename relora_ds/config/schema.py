"""The recipe as one typed tree: the fields, their defaults, and what follows from them."""

import math
from dataclasses import InitVar, asdict, dataclass, field

from relora_ds.config import merge, spelling, validate
from relora_ds.config.names import ds_config_names, preset_names


@dataclass(kw_only=True)
class ModelConfig:
    """Which network. Exactly one of `preset` (shipped LLaMA shapes) and `name_or_path` (hub id, directory, JSON)."""

    preset: str | None = None
    name_or_path: str | None = None
    init: str = "random"  # random | pretrained
    attn_implementation: str = "sdpa"
    use_liger_kernel: bool = False  # fused cross-entropy, norms and SwiGLU of liger-kernel; CUDA only


@dataclass(kw_only=True)
class ReLoRAConfig:
    """The low-rank phase: `W + s·B·A`, merged and restarted every `restart_every` steps (arXiv 2307.05695, sec. 3).

    r, lora_alpha, lora_dropout, target_modules: PEFT's names and meanings; `s = lora_alpha / r`, with `use_rslora`
        `lora_alpha / sqrt(r)`. `target_modules` is "all-linear" (every linear layer but the output head), a list of
        module names or name suffixes, or a regular expression that a whole module name matches.
    exclude_modules: what to leave out of `target_modules`, as in PEFT: a list of names or suffixes, or an expression.
    target_parameters: names or name suffixes of parameters that are low-rank without being a linear's weight, such as
        the 3-D weights of a mixture of experts; as in PEFT.
    trainable_modules: what trains at full rank beside A and B; None = embeddings, output head and norms. PEFT's name,
        `modules_to_save`, is taken too.
    restart_every: applied optimizer steps between restarts; None = never (plain LoRA on a frozen W).
    restart_warmup_steps: length of the linear re-warm-up after a restart, in steps.
    optimizer_reset, reset_ratio: what happens to Adam's moments of A and B at a restart. `magnitude_joint` keeps the
        largest `1 - reset_ratio` of |exp_avg| and applies that one mask to both moments.
    restart_init: what A becomes at a restart: kaiming (the paper's), orthogonal (to the A's that earlier cycles began
        with), or gradient (the dominant row space of W's gradient in the step before); see `lowrank.reinit`.
    frozen_dtype: how W is stored; auto = the precision of the run. frozen_double_quant: nf4's scales in 8 bit too.
    frozen_master: where the fp32 masters of W live when W is stored below fp32, spread over the ranks; none = what a
        merge rounds away is lost.
    frozen_placement: whether ZeRO-3 shards W; auto = replicated at stages 0 to 2, sharded at 3.

    Constructing one checks nothing; `problems()` lists what is wrong with the values.
    """

    r: int = 128
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_modules: list[str] | None = None
    use_rslora: bool = False
    restart_every: int | None = None
    restart_warmup_steps: int = 100
    optimizer_reset: str = "magnitude_joint"  # magnitude_joint | magnitude | random | zero | none
    reset_ratio: float = 0.99
    restart_init: str = "kaiming"  # kaiming | orthogonal | gradient
    frozen_dtype: str = "auto"  # auto | fp32 | bf16 | fp16 | int8 | nf4 | fp8
    frozen_double_quant: bool = False
    frozen_master: str = "cpu"  # cpu | device | none
    frozen_placement: str = "auto"  # auto | replicated | sharded
    modules_to_save: InitVar[list[str] | None] = None

    def __post_init__(self, modules_to_save: list[str] | None) -> None:
        if modules_to_save is not None:
            if self.trainable_modules not in (None, modules_to_save):
                raise ValueError(
                    f"ReLoRAConfig.modules_to_save: {modules_to_save} and trainable_modules: {self.trainable_modules} "
                    "are two names of one setting; give one of them"
                )
            self.trainable_modules = modules_to_save

    @property
    def scaling(self) -> float:
        """`s` of `W + s·B·A`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def problems(self) -> list[str]:
        """What is wrong with the values, one message each (`relora.<field>: <value> … <remedy>`); [] when usable."""
        return validate.relora_problems(self)


@dataclass(kw_only=True)
class LoRAConfig:
    """Method `lora` only; rank, alpha and targets come from `relora`.

    base: none = no W at all, `y = s·B·A·x` (the paper's LoRA baseline); random = a frozen random W; warm_start = the
    W that `warm_start_steps` of full-rank training (or `init_from`) leave behind.
    """

    base: str = "none"


@dataclass(kw_only=True)
class TrainConfig:
    """How much. Exactly one of steps/tokens and exactly one of batch_sequences/batch_tokens.

    tokens = sequences × seq_len, over the whole run including the warm start. The batch is that of one optimizer step
    over all ranks; micro_batch_size is the sequences of one forward on one rank.
    """

    steps: int | None = None
    tokens: int | None = None
    batch_sequences: int | None = None
    batch_tokens: int | None = None
    micro_batch_size: int = 8


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and the learning-rate schedule. `warm_start_*` None = the value of the low-rank phase."""

    lr: float = 1e-3
    warm_start_lr: float | None = None
    warmup_steps: int = 500
    warm_start_warmup_steps: int | None = None
    min_lr_ratio: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0 = no clipping


@dataclass(kw_only=True)
class DataConfig:
    """Corpus and tokenizer.

    source: wikitext2, pydocs and gutenberg need nothing else; c4 is streamed until `max_tokens`, from the hub or from
        shards in the directory `path`; text reads `path`: a file, directory or glob of text (one document per file),
        JSON lines or parquet (one per record, in `text_column`); pretokenized trains from the directory `path` that
        `python -m relora_ds prepare` wrote, with the tokenizer inside. Anything with a slash is what
        `datasets.load_dataset` takes, with its `config` and `split`: streamed with `max_tokens`, loaded without.
    validation: a path, or the fraction of the documents to hold out; None = the corpus' own validation split, else
        0.05. Of a stream it is bounded too, by a twentieth of `max_tokens` and 10 M tokens.
    max_tokens: training tokens to stop at.
    tokenizer: a hub id or a directory; None = train a sentencepiece BPE of `vocab_size` pieces on the corpus.
    packing: False = one document per row, cut or padded to `seq_len`, instead of windows of the whole corpus.
    """

    source: str = "wikitext2"  # wikitext2 | pydocs | gutenberg | c4 | text | pretokenized | org/name
    path: str | None = None
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    validation: str | float | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None
    vocab_size: int = 8192
    seq_len: int = 256
    packing: bool = True
    cache_dir: str | None = None


@dataclass(kw_only=True)
class EvalConfig:
    """When the validation loss is computed, and how many texts the network writes each time.

    every: in steps. Whatever it is, there is an evaluation at the end of each phase (so also of the run), and one at
        the end of each cycle, directly after its restart, that had none; None = only these.
    max_tokens: evaluations within a phase take about so many validation tokens, spread over the split; those at its
        end, all. None = all.
    samples: continuations of the beginnings of so many validation documents, shown with each evaluation; 0 = none.
    """

    every: int | None = None
    max_tokens: int | None = None
    samples: int = 1


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int | None = None  # in steps; None = only at the end
    keep_last: int = 2
    keep_every: int | None = None  # in steps: checkpoints at its multiples are never deleted


@dataclass(kw_only=True)
class LogConfig:
    every: int = 10  # in steps
    to: list[str] = field(default_factory=lambda: ["tensorboard"])  # tensorboard | wandb | mlflow | trackio
    update_rank: bool = False  # at each restart the effective rank of what W has gained since the warm start


@dataclass(kw_only=True)
class GuardConfig:
    max_bad_steps: int = 10  # consecutive non-finite steps before the run gives up
    watchdog_seconds: int = 1800  # without a step before the run is called stuck
    spike_zscore: float = 8.0  # robust standard deviations above the median of the last losses: a loss spike
    on_spike: str = "report"  # report | skip (do not apply the step) | rollback (to the newest checkpoint, later data)


@dataclass(kw_only=True)
class Recipe:
    """One run. Field names are a contract with users' recipes and scripts."""

    method: str = "relora"  # full | control | lora | relora
    seed: int = 0
    run_dir: str | None = None  # load_recipe fills in runs/<recipe name>
    resume: str | bool = False  # False | "auto": newest checkpoint in run_dir, if any | a checkpoint's or run's path
    overwrite: bool = False
    precision: str = "auto"  # fp32 | bf16 | fp16 | auto, see resolve_precision
    deepspeed: str = "zero1"  # a shipped configuration's name or a path
    compile: bool = False
    activation_checkpointing: str = "none"  # none | full | selective | cheap, see models.recompute
    warm_start_steps: int = 0
    carry_moments: bool = False
    init_from: str | None = None
    trust_remote_code: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    relora: ReLoRAConfig = field(default_factory=ReLoRAConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    @property
    def batch_sequences(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        if self.train.batch_sequences is not None:
            return self.train.batch_sequences
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
        return -(-self.train.tokens // self.tokens_per_step)

    @property
    def full_rank_steps(self) -> int:
        """Full-rank steps at the start of the run: all of them for full and control, else the warm start's.

        LoRA without a base, or on a random one, has no use for a warm start: 0.
        """
        if self.method in ("full", "control"):
            return self.total_steps
        if self.method == "lora" and self.lora.base != "warm_start":
            return 0
        return self.warm_start_steps

    @property
    def low_rank_steps(self) -> int:
        """`N` of the schedule: steps of the low-rank phase."""
        return self.total_steps - self.full_rank_steps

    @property
    def num_restarts(self) -> int:
        """Scheduled restarts: the multiples of restart_every strictly inside (0, low_rank_steps)."""
        if self.method != "relora" or self.relora.restart_every is None:
            return 0
        return max(0, self.low_rank_steps - 1) // self.relora.restart_every

    def problems(self, check_files: bool = True) -> list[str]:
        """What is wrong with the values; [] when the recipe can run. check_files: also look whether files exist."""
        return validate.recipe_problems(self, preset_names(), ds_config_names(), check_files)

    def warnings(self) -> list[str]:
        """What is allowed but has no effect, or not the effect one would expect. Only for a recipe without problems."""
        return validate.recipe_warnings(self)

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, without `resume` and `overwrite`, which are of one start only.

        `load_recipe` of it gives an equal Recipe but for these two.
        """
        return spelling.to_yaml({key: value for key, value in asdict(self).items() if key not in merge.OF_ONE_START})
