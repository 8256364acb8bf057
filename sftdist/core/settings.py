"""The dataclass tree of every configuration file: the one place where an option is declared.

Plain typed values only. `core.config` composes YAML and command line into these classes and
checks them; everything behind the entry points takes plain values, never a config object.
Lists of words in a comment are checked by `core.config.check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

CONFIG_VERSION = 1


class Precision(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class MixMode(StrEnum):
    sampling = "sampling"
    loss = "loss"


class Overlong(StrEnum):
    drop = "drop"
    truncate = "truncate"
    error = "error"


class TrainOn(StrEnum):
    all = "all"
    last = "last"
    flagged = "flagged"


class Reasoning(StrEnum):
    keep = "keep"
    last = "last"
    drop = "drop"


class OnFinding(StrEnum):
    """What is done with train rows in which something was found: told, left out, or the data refused."""

    report = "report"
    drop = "drop"
    error = "error"


class NearDuplicates(StrEnum):
    off = "off"
    report = "report"
    drop = "drop"


class Leaks(StrEnum):
    off = "off"
    drop = "drop"
    error = "error"


class RowShape(StrEnum):
    auto = "auto"
    messages = "messages"
    prompt_completion = "prompt_completion"
    alpaca = "alpaca"
    sharegpt = "sharegpt"


class Method(StrEnum):
    full = "full"
    lora = "lora"
    qlora = "qlora"


class LossWeighting(StrEnum):
    token = "token"
    conversation = "conversation"


class Attention(StrEnum):
    auto = "auto"
    flash_attn = "flash_attn"
    torch_varlen = "torch_varlen"
    sdpa = "sdpa"


class Kernels(StrEnum):
    auto = "auto"
    torch = "torch"
    liger = "liger"


class Init(StrEnum):
    pretrained = "pretrained"
    random = "random"


class OptimizerName(StrEnum):
    adamw = "adamw"
    sgd = "sgd"


class Schedule(StrEnum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Offload(StrEnum):
    none = "none"
    optimizer = "optimizer"


class Wandb(StrEnum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


class Engine(StrEnum):
    hf = "hf"
    vllm = "vllm"


class ExportDtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass(kw_only=True)
class RunSettings:
    dir: str | None = None  # default: runs/<run.name>
    name: str | None = None  # default: <exp>-<8 hex digits of the config>
    note: str = ""


@dataclass(kw_only=True)
class NormaliseSettings:
    """What is changed in a text before it is used; each rule is counted by its name."""

    line_ends: bool = True  # \r\n and \r become \n
    unicode_nfc: bool = True  # composed characters
    trailing_blanks: bool = True  # blanks and tabs at the end of a line
    template_trim: bool = True  # outer white space that the template would strip from a message


@dataclass(kw_only=True)
class NearSettings:
    """Near duplicates, by the estimated Jaccard similarity of word shingles."""

    duplicates: NearDuplicates = NearDuplicates.report  # among the train rows of a source
    threshold: float = 0.55  # chosen by benchmarks/near.py: 97 % of edited copies found
    shingle: int = 3  # words


@dataclass(kw_only=True)
class RequireSettings:
    """The least number of train rows per tag and per label origin; fewer are refused."""

    tags: dict[str, int] = field(default_factory=dict)
    origins: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class SourceSettings:
    """One source of conversations. `path`: a file, glob, folder, list of those, or `hub:NAME`."""

    path: Any = None
    shape: RowShape = RowShape.auto
    lam: float | None = None  # lambda of the objective; without: the source's natural share
    max_passes: float | None = None  # default: data.max_passes
    train_on: TrainOn | None = None  # default: data.train_on
    row_function: str | None = None  # package.module:function, row -> row | None | list of rows
    reader: str | None = None  # package.module:function, file -> rows, for files of another format
    hub_split: str = "train"
    hub_config: str | None = None
    hub_revision: str | None = None
    contract: str | None = None  # a YAML file: what the answers of this source must fulfil
    on_breach: OnFinding = OnFinding.error
    schema_version: int | None = None  # of rows that name none; default: the newest
    licence: str | None = None  # goes into the data manifest, as origin does
    origin: str | None = None
    label_origin: str | None = None  # human | synthetic:MODEL, of rows that name none


@dataclass(kw_only=True)
class DataSettings:
    train: Any = None  # file, glob, list or hub:NAME; replaces the preset's sources
    val: Any = None
    holdout: Any = None
    dir: str | None = None
    sources: dict[str, SourceSettings] = field(default_factory=dict)
    mix: Any = None  # {source: lambda}, [lambda, ...] in the order of the sources, or a name in conf/mix
    mix_mode: MixMode = MixMode.sampling
    temperature: float | None = None  # lambda ~ share^(1/temperature) where no lambda is given
    max_passes: float | None = 10.0
    max_len: int = 8192
    overlong: Overlong = Overlong.drop
    train_on: TrainOn = TrainOn.all
    reasoning: Reasoning = Reasoning.keep
    expand_turns: bool = False
    val_fraction: float = 0.02
    holdout_fraction: float = 0.02
    holdout_lock: str | None = None  # the committed file that says what is held out
    leaks: Leaks | None = None  # train rows near held-out ones; default: drop, but error for a data.holdout of your own
    decontaminate: Any = None  # a file or list of evaluation prompts that are kept out of training
    normalise: NormaliseSettings = field(default_factory=NormaliseSettings)
    deduplicate: bool = True  # exact duplicates, after normalising
    near: NearSettings = field(default_factory=NearSettings)
    contradictions: OnFinding = OnFinding.report  # one prompt, different answers
    cut_off: OnFinding = OnFinding.report  # answers that break off
    require: RequireSettings = field(default_factory=RequireSettings)
    allow_unrendered: list[str] = field(default_factory=list)  # fields of a row that the template may leave out
    max_bad_rows: int = 0
    max_refused: int = 0
    store_dir: str = "stores"
    workers: int = 0  # processes of prepare; 0: one per core


@dataclass(kw_only=True)
class ModelSettings:
    path: str | None = None
    revision: str | None = None
    init: Init = Init.pretrained
    shape: dict[str, Any] | None = None  # a transformers config as a mapping, `model_type` included
    tokenizer: str | None = None  # default: model.path
    vocabulary: int | None = None  # train a byte-level BPE of this size on the train sources
    chat_template: str | None = None  # chatml | llama3 | FILE; default: the tokenizer's own
    template_args: dict[str, Any] = field(default_factory=dict)  # further template variables: {enable_thinking: false}
    add_tokens: list[str] = field(default_factory=list)  # one id each; their rows begin as the mean and are trained
    attention: Attention = Attention.auto
    activation_checkpointing: bool = False
    recompute_layers: int | None = None  # with activation_checkpointing: of how many layers; default: of all
    kernels: Kernels = Kernels.auto  # liger: fused norms, rotary embedding, MLP and loss, where it is installed
    compile: bool = False  # torch.compile, one layer at a time
    loss_chunk: int = 2048  # supervised positions whose logits exist at a time


@dataclass(kw_only=True)
class TuneSettings:
    method: Method = Method.full
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    target: Any = "all-linear"  # or a list of module names
    double_quant: bool = True  # qlora: the constants of the 4-bit blocks are quantised, too


@dataclass(kw_only=True)
class ZeroSettings:
    stage: int = 2
    offload: Offload = Offload.none
    deepspeed: dict[str, Any] = field(default_factory=dict)  # further DeepSpeed keys; owned keys are refused


@dataclass(kw_only=True)
class TrainSettings:
    packing: bool = True
    pack_tokens: int | None = None  # tokens in one forward; default: data.max_len
    packs_per_step: int | None = None  # exactly one of these three
    tokens_per_step: int | None = None
    conversations_per_step: int | None = None
    max_steps: int | None = None
    epochs: float | None = None
    loss_weighting: LossWeighting = LossWeighting.token
    window: int | None = None  # conversations planned at a time; default: 4096, more where steps are small
    startup_checks: bool = True
    loss: str | None = None  # package.module:function, (logits, targets) -> a loss per token; default: cross-entropy
    loss_args: dict[str, Any] = field(default_factory=dict)
    hooks: list[str] = field(default_factory=list)  # package.module:name, told of each step and checkpoint
    profile: list[int] = field(default_factory=list)  # [first,last]: steps of which every rank writes a trace


@dataclass(kw_only=True)
class OptimizerSettings:
    name: str = "adamw"  # adamw | sgd | package.module:name, an optimizer of your own
    args: dict[str, Any] = field(default_factory=dict)  # of an optimizer of your own
    lr: float = 2e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "cosine"  # cosine | linear | constant | package.module:function
    schedule_args: dict[str, Any] = field(default_factory=dict)  # of a schedule of your own
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.1


@dataclass(kw_only=True)
class CheckpointSettings:
    every_steps: int = 100  # 0: never, but for the one at the end
    keep_last: int = 2
    keep_every: int = 0  # checkpoints of steps divisible by this stay, too; 0: none
    keep_best: bool = False  # the best one stays, too
    best: str = "eval/loss"  # what is the best: the lowest eval/loss, or a metric that `evaluate watch=true` follows
    background: bool = False  # train on while a checkpoint is written; takes host memory for one checkpoint
    grace_seconds: float = 300.0


@dataclass(kw_only=True)
class EvalSettings:
    every_steps: int = 100  # 0: never
    max_conversations: int | None = 512  # per source


@dataclass(kw_only=True)
class TrackingSettings:
    wandb: Wandb | None = None  # default: online with a key, else offline
    project: str = "sftdist"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    sinks: list[str] = field(default_factory=list)  # package.module:name, trackers of your own


@dataclass(kw_only=True)
class LaunchSettings:
    nproc: int | None = None  # ranks of this host; default: one per GPU, else one
    nodes: int = 1  # hosts; the same command runs on each of them
    address: str | None = None  # HOST:PORT of the first one, where there are several
    node_rank: int | None = None  # this host's number, from 0 on; without it the hosts agree on their order
    join_seconds: float = 1800.0  # how long the nodes wait for one another at the start
    max_restarts: int = 0  # how often the ranks are started again after a failure that may pass
    lost_seconds: float = 60.0  # a rank or host that is not heard of for so long has failed
    hang_seconds: float = 1800.0  # a rank that does not get on for so long has failed


@dataclass(kw_only=True)
class ExportSettings:
    dtype: ExportDtype = ExportDtype.bf16
    shard_gib: float = 4.0
    merge: bool = True  # LoRA: a merged model beside the adapter


@dataclass(kw_only=True)
class SweepSettings:
    metric: str | None = None  # a key of metrics.jsonl: what a job of a sweep returns; default: eval/loss


@dataclass(kw_only=True)
class JudgeSettings:
    """A model behind an OpenAI-compatible URL that judges answers."""

    url: str | None = None  # such as http://localhost:8000/v1; without: nobody judges
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    rubric: str | None = None  # a text file; default: the package's own


@dataclass(kw_only=True)
class EvalsSettings:
    """What `evaluate` measures, and how the models answer."""

    probes: list[str] = field(
        default_factory=lambda: ["task", "behaviour", "format", "contract", "safety", "robustness", "loss"]
    )
    max_prompts: int | None = 200  # per source
    max_new_tokens: int = 256
    engine: Engine = Engine.hf
    batch_size: int = 16
    precision: Precision | None = None  # of the weights that answer; default: fp32 on a CPU, bf16 on a GPU
    schemas: dict[str, str] = field(default_factory=dict)  # source: file with the JSON Schema of its answers
    functions: list[str] = field(default_factory=list)  # package.module:function, of your own metrics
    policy: Any = None  # a file or list of prompts with the expected stance, beside the package's own
    adversarial: bool = True  # the package's own adversarial prompts
    robustness: list[str] = field(default_factory=lambda: ["typos", "case", "paraphrase", "no_system"])
    robustness_prompts: int = 50  # per source
    classifier: str | None = None  # folder of a text classifier whose label says that an answer is unsafe
    unsafe_label: str = "unsafe"
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    confidence: float = 0.95  # of the intervals in the report
    resamples: int = 2000
    cache: str | None = None  # folder of answers that were given already; default: <data.store_dir>/answers


@dataclass(kw_only=True)
class GateSettings:
    """What a model must fulfil before it is released; a rule is text, or a mapping with `rule` and keys of its own."""

    rules: list[Any] = field(default_factory=list)
    min_prompts: int = 50  # fewer prompts decide nothing: the rule is refused
    confidence: float = 0.95


@dataclass(kw_only=True)
class TrainConfig:
    """Everything that `prepare`, `train`, `plan` and `inspect` share."""

    config_version: int = CONFIG_VERSION
    exp: str = "custom"
    seed: int = 0
    precision: Precision = Precision.bf16
    dry_run: bool = False
    auto: bool = False  # take the fastest setting that fits into the GPUs, and say why
    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    tune: TuneSettings = field(default_factory=TuneSettings)
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    evals: EvalsSettings = field(default_factory=EvalsSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    registry: str = "registry"  # where releases are: what model.path=release:NAME@vN means, and where publish puts one
    code: dict[str, str] = field(default_factory=dict)  # made: hashes of the sources of yours that train


@dataclass(kw_only=True)
class DataConfig(TrainConfig):
    """The keys of train for a command that looks at the data alone: the step and the engine may be left out."""


@dataclass(kw_only=True)
class PrepareConfig(DataConfig):
    """The keys of train, and what `prepare` adds."""

    lock: str | None = None  # write | extend | withdraw: what to do with the file data.holdout_lock
    diff: str | None = None  # another data manifest, to compare the new one with


@dataclass(kw_only=True)
class InspectConfig(DataConfig):
    """The keys of train, and what `inspect` adds."""

    limit: int | None = None  # rows
    step: str | None = None  # the packs of this optimizer step, from 1, instead of all rows; with worst: a checkpoint
    worst: int | None = None  # so many train rows with the largest loss under a checkpoint of run.dir
    output: str = "terminal"  # terminal | html | jsonl
    file: str | None = None  # where html or jsonl goes; default: standard output


@dataclass(kw_only=True)
class TrainJobConfig(TrainConfig):
    """The keys of a training, and what the command `train` does in place of one: to find a fault."""

    replay: str | None = None  # a run directory: its step `step` again, layer by layer; nothing of the run changes
    step: int | None = None  # with replay: an optimizer step, from 1
    overfit: int | None = None  # train on so many rows until the loss is about 0, or say what is broken


@dataclass(kw_only=True)
class ExportConfig(TrainConfig):
    """The keys of train, and which checkpoint of `run.dir` the command `export` takes."""

    step: str = "latest"  # latest | best (the lowest eval/loss) | the number of a step
    merge: bool | None = None  # LoRA: a merged model beside the adapter, or the adapter alone; default: export.merge


@dataclass(kw_only=True)
class ClusterSettings:
    """The machine that `plan` plans for."""

    gpus: Any = 8  # or a list, [8,64,512]: how the job would scale
    gpu: str = "h100"  # a name of the table in model/hardware.py
    memory_gib: float | None = None  # of one GPU; default: what it has
    gpus_per_node: int = 8
    network_gbps: float = 400.0  # Gb/s per GPU between nodes; default: InfiniBand NDR


@dataclass(kw_only=True)
class PlanConfig(TrainConfig):
    """The keys of train, and the machine that `plan` plans for."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    output: str = "terminal"  # terminal | json
    file: str | None = None  # write the result there, too: .html or .svg (the scaling curve), or .json


@dataclass(kw_only=True)
class EvaluateConfig(DataConfig):
    """The keys of train, and what `evaluate` adds. Without a run in `run.dir`, `model.path` is the model to judge."""

    candidate: str | None = None  # a model folder, adapter or release NAME@vN; default: the run's export
    base: str | None = None  # what it is compared with; default: the run's model.path, an adapter's base
    split: str = "validation"  # validation | holdout
    tasks: list[str] = field(default_factory=list)  # of lm-eval: names, or task files of your own
    watch: bool = False  # score each new checkpoint of run.dir
    watch_seconds: float = 30.0  # between two looks


@dataclass(kw_only=True)
class PublishConfig(EvaluateConfig):
    """The keys of evaluate, and what `publish` adds."""

    name: str | None = None  # of the release
    split: str = "holdout"
    hub: str | None = None  # push the release to this repository of the Hugging Face Hub, too
    hub_private: bool = True
    hub_rows: bool = True  # with the holdout's prompts and the answers; a public repository is not given them


@dataclass(kw_only=True)
class MonitorConfig(DataConfig):
    """The keys of train, and what `monitor` adds."""

    release: str | None = None  # NAME@vN, NAME (the latest), or the folder of a release
    traffic: Any = None  # JSONL files of live prompts, and answers where there are
    to_label: str | None = None  # file for a sample of prompts that are out of the profile
    to_label_rows: int = 200
    regression: bool = False  # ask the holdout's prompts again
    endpoint: str | None = None  # OpenAI-compatible URL of the served release; default: its folder
    endpoint_model: str | None = None
    report: str | None = None  # folder of the report; default: <release>/monitor beside the registry
