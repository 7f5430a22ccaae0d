"""The recipe: everything a run depends on, validated before anything starts.

Every field states its unit, its range and what 0 or none means. An unknown key is an error that names the nearest
known one. Defaults are the vetted settings; a recipe file lists only what differs.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from coupled.rl.errors import nearest

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


COLUMNS = ("uid", "prompt", "hidden_tests", "visible_tests", "entry_point", "setup", "solution", "style")
"""Dataset columns that are understood; all others go to reward functions of the user."""
FIT_COLUMNS = ("text", "messages", "response")
"""What the stages before RL read besides."""


class Section(BaseModel):
    """A part of the recipe: frozen, strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Adapter(Section):
    """LoRA: train low-rank adapters instead of all weights."""

    rank: Positive = Field(default=16, description="rank of the update matrices")
    alpha: float = Field(default=32.0, gt=0, description="scale of the update: alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="names of the linear layers that get adapters",
    )


class Model(Section):
    path: str = Field(description="checkpoint folder (relative to the recipe file), or a hub name 'owner/name'")
    init: Literal["checkpoint", "random"] = Field(
        default="checkpoint",
        description="'random' reads only config.json and the tokenizer, and draws the weights",
    )
    family: str | None = Field(default=None, description="model family; none reads it from the checkpoint")
    shift: Annotated[int, Field(ge=0, le=1)] | None = Field(
        default=None, description="logit shift, 0 or 1; none takes the family's"
    )
    block_length: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="attention in blocks of so many positions, or 0 for attention to the whole sequence; none takes "
        "the family's",
    )
    mask_token: str | None = Field(
        default=None,
        description="the token that means MASK; a new one is added to an autoregressive model; none takes the "
        "checkpoint's",
    )
    end_tokens: tuple[str, ...] = Field(
        default=(), description="tokens that end a completion; none takes the checkpoint's and the family's"
    )
    trust_remote_code: bool = Field(
        default=False, description="run the modelling code in the checkpoint's folder; families never need it"
    )
    adapter: Adapter | None = Field(default=None, description="none trains all weights")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16 runs the forward pass under autocast; log-softmax stays fp32"
    )
    weights_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the weights under an adapter; bfloat16 halves the memory they take",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU when there is one")
    has_cuda_graphs: bool = Field(
        default=False, description="rollouts of full attention replay small passes on a GPU; not measured yet"
    )

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> Model:
        if self.init == "random" and self.adapter is not None:
            raise ValueError(
                "an adapter needs a saved base to be opened again: model.init is 'random', so train all weights "
                "(model.adapter=null), or give a checkpoint (model.init=checkpoint)"
            )
        if self.weights_dtype == "bfloat16" and self.compute_dtype == "float32":
            raise ValueError(
                "weights in bfloat16 cannot compute in float32; set model.compute_dtype=bfloat16, too, or leave "
                "model.weights_dtype out"
            )
        if self.weights_dtype != "float32" and self.adapter is None:
            raise ValueError(
                "weights that are trained must be float32, for bfloat16 rounds small updates away; got "
                f"model.weights_dtype={self.weights_dtype!r} without model.adapter. Use model.compute_dtype=bfloat16 "
                "for speed, or train an adapter"
            )
        return self


class Data(Section):
    path: str = Field(description="JSONL or Parquet file (relative to the recipe file), or a dataset name of the hub")
    eval_path: str | None = Field(default=None, description="held-out problems, same format; none skips evaluation")
    split: str = Field(default="train", description="split to take of a hub dataset")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our column name → the file's, e.g. {prompt: text, hidden_tests: test_list}",
    )
    num_visible_tests: int = Field(
        default=0,
        ge=0,
        description="the first n hidden tests of a row are shown in its prompt and not scored",
    )
    max_prompt_tokens: Positive = Field(default=200, description="longer prompts are dropped")
    window: int = Field(
        default=0,
        ge=0,
        description="of pretrain and sft: rows that are read ahead and shuffled; 0 reads all rows into memory first",
    )

    @model_validator(mode="after")
    def _known_columns(self) -> Data:
        for name in self.columns:
            if name not in COLUMNS + FIT_COLUMNS:
                raise ValueError(
                    f"data.columns maps our names to the file's; {name!r} is none; "
                    f"{nearest(name, COLUMNS + FIT_COLUMNS)}"
                )
        return self


class Monitor(Section):
    """Decode a few prompts of a step a second time, exactly, and compare."""

    every: int = Field(default=0, ge=0, description="steps between comparisons, from the first step on; 0: none")
    num_prompts: Positive = Field(default=4, description="prompts of the step that are decoded twice, whole groups")
    tolerance: float = Field(
        default=0.1,
        ge=0,
        description="mean reward may differ by so much, in units of the reward; beyond it, and beyond two standard "
        "errors, it is a mismatch",
    )
    on_mismatch: Literal["warn", "fall_back", "stop"] = Field(
        default="warn", description="say so; roll out exactly from the next step on; or end the run"
    )


PRESETS: dict[str, dict[str, Any]] = {
    "rl": {},
    "reference": {"top_p": 0.95, "has_early_exit": False},
    "fast": {"entropy_bound": 0.1, "end_fill": 0.99},
}
"""What the presets of `rollout` set; fields that they do not name keep their defaults."""
OF_PRESETS = (
    "top_p",
    "has_early_exit",
    "entropy_bound",
    "end_fill",
    "confidence_threshold",
    "cache",
    "refresh_steps",
)
"""Fields of `rollout` that choosing another preset sets anew."""


class Rollout(Section):
    workers: Literal["inline", "process", "ray"] = Field(
        default="inline",
        description="inline: in this process, on the weights that are trained; process: processes of this host; ray: "
        "actors, here or on a cluster (cluster.address)",
    )
    num_workers: Positive = Field(default=2, description="rollout workers, when workers is process or ray")
    num_prompts: Positive = Field(default=16, description="prompts per step")
    group_size: Annotated[int, Field(ge=2)] = Field(default=10, description="completions per prompt, G")
    preset: Literal["rl", "reference", "fast"] = Field(
        default="rl",
        description="rl: exact; reference: the published loop, with its nucleus and to the end of the canvas; fast: "
        "bounded (entropy_bound, end_fill). Fields that are given win over the preset",
    )
    canvas: Positive = Field(default=256, description="positions denoised after the prompt, in tokens")
    denoising_steps: Positive = Field(default=256, description="forward passes per completion; at most canvas")
    temperature: float = Field(default=1.2, gt=0, description="of the token distribution")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="nucleus mass kept; 1 keeps all")
    top_k: int = Field(default=0, ge=0, description="likeliest tokens kept, before top_p; 0 keeps all")
    order: Literal["entropy", "maskgit", "margin", "origin"] = Field(
        default="entropy",
        description="which positions are committed: lowest entropy, likeliest draw, largest margin, or random",
    )
    block_length: int = Field(
        default=0,
        ge=0,
        description="of full attention: so many canvas positions are denoised before any later one; 0: the whole "
        "canvas. Models with block attention have their own",
    )
    has_early_exit: bool = Field(
        default=True,
        description="a completion is done when everything before its first end token is; false: when the canvas is",
    )
    entropy_bound: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="bounded: each step also commits the surest tokens while the entropies of all but the last add up "
        "to at most this, in nats; none: by the schedule alone",
    )
    end_fill: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="bounded, of full attention: behind an end token, positions that are at least so sure to be "
        "another get it at once; none: each waits for its turn",
    )
    confidence_threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="approximate: each step also commits every token that is at least so sure; none: by the schedule "
        "alone",
    )
    cache: Literal["none", "prefix", "dual"] = Field(
        default="none",
        description="approximate, of full attention: keys and values before the block (prefix), or outside of it "
        "(dual), are kept from the last refresh; none computes everything in each step",
    )
    refresh_steps: int = Field(
        default=0, ge=0, description="with a cache: steps until it is computed anew; 0: at the start of a block alone"
    )
    batch_size: Positive = Field(default=64, description="rows per forward pass; also what one actor gets at a time")
    monitor: Monitor = Field(
        default=Monitor(), description="a second, exact decoding of a few prompts, to compare with"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return PRESETS.get(str(values.get("preset", "rl")), {}) | values

    @model_validator(mode="after")
    def _caches_something(self) -> Rollout:
        if self.cache == "dual" and not self.block_length:
            raise ValueError(
                "cache=dual keeps what is behind the block that is denoised, and block_length=0 makes the whole canvas "
                "one block; set a block_length, for example 32, or cache=prefix"
            )
        if self.refresh_steps and self.cache == "none":
            raise ValueError(
                f"refresh_steps={self.refresh_steps} has no effect without a cache; leave it out, or set cache=prefix"
            )
        return self


READ_BY = {
    "weights": ("coupled", "decoupled"),
    "mask_ratio": ("coupled", "decoupled", "random_mask"),
    "draw": ("coupled", "decoupled", "random_mask"),
    "num_pairs": ("coupled", "decoupled", "random_mask", "espo"),
    "num_nodes": ("gdpo",),
    "shrink": ("trajectory",),
    "num_sampled_steps": ("trajectory",),
}
"""Fields of `Estimator` that some estimators do not read; those not listed matter to all of them."""


class Estimator(Section):
    name: Literal["coupled", "decoupled", "full_mask", "random_mask", "espo", "gdpo", "trajectory", "ar_order"] = Field(
        default="coupled",
        description="how a completion's log-probabilities are estimated; espo and gdpo score it as a whole, trajectory "
        "replays the rollout's steps, ar_order needs one forward pass per canvas position",
    )
    weights: Literal["paper", "normalized", "antithetic", "unit"] = Field(
        default="paper",
        description="of coupled and decoupled: the published sum; the same summing to 1; the pairs alone with 1/t; "
        "the pairs alone, each token once",
    )
    mask_ratio: tuple[Fraction, Fraction] = Field(
        default=(0.2, 0.8), description="range of t, symmetric about 1/2; the pair has ratios t and 1 - t"
    )
    draw: Literal["bernoulli", "exact_count"] = Field(
        default="bernoulli",
        description="of coupled, decoupled and random_mask: each token masked with probability t, or a share t of "
        "them exactly (to whole tokens, at least one)",
    )
    num_pairs: Positive = Field(
        default=1,
        description="mask pairs per inner iteration, λ; espo: draws; random_mask: half its masks",
    )
    num_nodes: Positive = Field(default=3, description="of gdpo: mask ratios of the quadrature, one mask each")
    shrink: Positive = Field(default=1, description="of trajectory: consecutive rollout steps replayed as one")
    num_sampled_steps: int = Field(
        default=0, ge=0, description="of trajectory: steps of a completion that are scored, drawn at random; 0: all"
    )
    prompt_mask_probability: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the prompt's tokens hidden while scoring (d1: 0.15); 0 hides none"
    )
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="of the scored distribution; none takes rollout.temperature, which makes it the one sampled from",
    )
    post_eos: Literal["kept", "mask", "excluded"] = Field(
        default="kept",
        description="positions after the end token: as the sampler left them; all MASK (lets a group share its fully "
        "masked pass); or not attended to, as if the canvas ended there",
    )

    @model_validator(mode="after")
    def _symmetric(self) -> Estimator:
        low, high = self.mask_ratio
        if not (0 < low <= high < 1) or abs(low + high - 1) > 1e-9:
            raise ValueError(
                f"mask_ratio must be a range (lo, hi) inside (0, 1) with lo + hi = 1, so that t and 1 - t have the "
                f"same law; got ({low}, {high}); for example [0.2, 0.8]"
            )
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Estimator:
        for field, readers in READ_BY.items():
            value, default = getattr(self, field), type(self).model_fields[field].default
            if self.name not in readers and value != default:
                raise ValueError(
                    f"{field}={_plain(value)} has no effect with name={self.name}: it is read by {', '.join(readers)}. "
                    f"Leave it out, or set it to its default ({field}={_plain(default)}), or choose another estimator"
                )
        return self


class Loss(Section):
    objective: Literal["clipped", "likelihood"] = Field(
        default="clipped",
        description="clipped: of the ratio to the policy that rolled out; likelihood: the score times its advantage, "
        "without a ratio (wd1: with advantage=softmax, estimator.name=full_mask and kl_beta=0)",
    )
    clip_low: float = Field(default=0.5, ge=0, lt=1, description="ratios below 1 - clip_low stop counting")
    clip_high: float = Field(default=0.5, ge=0, description="ratios above 1 + clip_high stop counting")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="where the advantage is negative, ratios above this stop counting, e.g. 3; none: only "
        "max_log_ratio bounds them",
    )
    ratio: Literal["token", "sequence"] = Field(
        default="token", description="each token its own ratio, or their geometric mean for the whole completion"
    )
    norm: Literal["token", "sequence", "fixed"] = Field(
        default="token",
        description="what counts alike over the whole batch: tokens; completions; or tokens divided by the canvas, "
        "a constant, instead of by their number",
    )
    kl: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="estimate of the KL to the reference; the gradient of k1 is zero on average"
    )
    kl_beta: float = Field(default=0.01, ge=0, description="weight of the KL penalty; 0 leaves the reference out")
    reference: Literal["frozen", "synced", "old"] = Field(
        default="frozen",
        description="what the KL pulls towards: the initial weights (with LoRA the base); a copy that follows the "
        "policy (sync_every, sync_mix); or the policy that rolled out",
    )
    sync_every: Positive = Field(
        default=64,
        description="steps between updates of a synced reference; 1 with a small sync_mix is a moving average",
    )
    sync_mix: Fraction = Field(
        default=0.6, description="share of the policy in an updated reference; the rest is the reference before"
    )
    negative_weight: Fraction = Field(
        default=1.0,
        description="factor on the advantages below 0: the estimate is a lower bound, a weak reason to push down",
    )
    max_log_ratio: float = Field(
        default=5.0, gt=0, description="log-ratios are clamped to ± this: k3 is exponential in them"
    )

    @model_validator(mode="after")
    def _clips_a_ratio(self) -> Loss:
        for field in ("clip_low", "clip_high", "dual_clip", "ratio"):
            value, default = getattr(self, field), type(self).model_fields[field].default
            if self.objective == "likelihood" and value != default:
                raise ValueError(
                    f"{field}={_plain(value)} has no effect with objective=likelihood, which has no ratio. Leave it "
                    f"out, or set it to its default ({field}={_plain(default)}), or use objective=clipped"
                )
        return self

    @property
    def has_old(self) -> bool:
        """Whether the scores of the policy that rolled out enter the loss."""
        return self.objective == "clipped" or (self.kl_beta > 0 and self.reference == "old")


class Optimizer(Section):
    learning_rate: float = Field(default=1e-6, gt=0, description="peak, AdamW")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear rise from 0")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="after the warm-up")
    final_fraction: Fraction = Field(default=0.1, description="learning rate at the end, as a share of the peak")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.99), description="AdamW moment decays")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay; 0 is none")
    max_grad_norm: float = Field(default=0.2, gt=0, description="gradients are scaled down to this global norm")
    micro_batch_size: Positive = Field(
        default=16,
        description="rows per backward pass; the gradient does not depend on it. A multiple of rollout.group_size lets "
        "whole groups share their fully masked pass",
    )
    has_two_passes: bool = Field(
        default=False,
        description="score without gradients first, then backpropagate one masked input at a time: the memory of one, "
        "however many the estimator has, for one more forward pass",
    )
    has_gradient_checkpointing: bool = Field(
        default=False,
        description="keep only the inputs of the layers and recompute the rest in the backward pass: less memory, for "
        "one more forward pass",
    )


class Reward(Section):
    name: str | None = Field(default=None, description="a built-in reward: code or format")
    path: str | None = Field(default=None, description="file.py:function of your own, with TRL's signature")
    weight: float = Field(default=1.0, description="factor in the sum")

    @model_validator(mode="after")
    def _one_source(self) -> Reward:
        if (self.name is None) == (self.path is None):
            raise ValueError(f"a reward has either name or path; got name={self.name!r}, path={self.path!r}")
        return self


class Rewards(Section):
    functions: tuple[Reward, ...] = Field(
        default=(Reward(name="code", weight=2.0), Reward(name="format", weight=0.5)),
        min_length=1,
        description="summed with their weights; the default is the published reward",
    )
    timeout_seconds: float = Field(default=60.0, gt=0, description="a reward function of yours may take this long")
    on_error: Literal["stop", "mask"] = Field(
        default="stop",
        description="when a reward function of yours raises, hangs, crashes or returns what is not a score: stop ends "
        "the run, to be resumed; mask leaves the completions that it fails on out of the update, and says so",
    )
    allow_weak: bool = Field(
        default=False,
        description="judge tests that must share the program's process (tier T2); a program can forge those",
    )


class Sandbox(Section):
    tier: Literal["auto", "namespaces", "landlock", "process", "remote"] = Field(
        default="auto",
        description="what holds the programs that are run: auto takes namespaces or else landlock, whichever passes "
        "its self-check here, or refuses; process only limits them and does not contain a hostile program; remote: a "
        "SandboxFusion server at url",
    )
    url: str | None = Field(
        default=None, pattern=r"^https?://", description="base address of the server, with tier remote; else none"
    )
    workers: Literal["inline", "ray"] = Field(
        default="inline", description="inline: jails under this process; ray: a supervisor with jails on every node"
    )
    num_workers: Positive = Field(default=2, description="programs run at the same time, on each node")
    cpu_seconds: Positive = Field(default=2, description="CPU time a program may use, whole seconds")
    wall_seconds: float = Field(default=6.0, gt=0, description="wall-clock time a program may take")
    memory_mb: Positive = Field(default=512, description="address space a program may add, in MiB")

    @model_validator(mode="after")
    def _url_goes_with_remote(self) -> Sandbox:
        if (self.tier == "remote") != (self.url is not None):
            raise ValueError(
                f"sandbox.url goes with sandbox.tier=remote and only with it; got tier={self.tier!r}, url={self.url!r}"
            )
        return self


class Evaluation(Section):
    every: int = Field(
        default=0, ge=0, description="steps between evaluations during training; 0: only before and after"
    )
    num_problems: Positive = Field(default=200, description="held-out problems, the first of eval_path")
    num_samples: Positive = Field(default=4, description="completions per problem at the rollout temperature")
    has_greedy: bool = Field(default=True, description="also decode each problem once at temperature 0")


class Checkpoint(Section):
    every: Positive = Field(default=1, description="steps between checkpoints; a crash loses at most these")
    keep: Positive = Field(default=2, description="newest checkpoints kept")


class Cluster(Section):
    """What a run is spread over: ranks that train, and workers outside of them, which may run ahead."""

    trainer_ranks: Positive = Field(
        default=1,
        description="processes that share the updates and the inline rollouts, one a GPU; adapters are replicated, and "
        "all weights (model.adapter=null) are sharded over them",
    )
    trainer_timeout_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="the ranks wait for each other this long at most; loading and the slowest share of a step must "
        "fit in",
    )
    trainer_workers: Literal["process", "ray"] = Field(
        default="process",
        description="where the ranks besides the first run, which is the run's own process. process: processes of this "
        "host; ray: actors, here or on a cluster (cluster.address)",
    )
    address: str | None = Field(
        default=None,
        pattern=r"^(auto|[^/:]+:\d+)$",
        description="ip:port of a running Ray cluster, or auto; none starts Ray on this host",
    )
    lag: int = Field(
        default=0,
        ge=0,
        le=2,
        description="training steps that rollouts run ahead; 0: on-policy, rollouts and training take turns",
    )
    max_mismatch: float = Field(
        default=0.1,
        gt=0,
        description="lag falls to 0 when the policy has moved from the one that rolled out by more than this (KL, nats "
        "per token) in two steps running",
    )
    min_workers: Positive = Field(
        default=1, description="rollout workers without which the run ends, to be resumed; others may come and go"
    )
    gpus_per_worker: float = Field(default=0.0, ge=0, description="share of GPUs that each Ray rollout actor reserves")
    weights: Literal["object", "file"] = Field(
        default="object",
        description="object: through Ray's object store; file: in the run folder, which every host must see",
    )
    health: Literal["patient", "fast"] = Field(
        default="patient",
        description="patient: hosts may be silent for a minute, a batch takes minutes; fast: one host or a quiet "
        "network, a batch takes seconds",
    )
    dashboard: bool = Field(default=False, description="whether a Ray started here has its dashboard")

    @model_validator(mode="after")
    def _has_others_to_wait_for(self) -> Cluster:
        default = type(self).model_fields["trainer_timeout_seconds"].default
        if self.trainer_ranks == 1 and self.trainer_timeout_seconds != default:
            raise ValueError(
                f"trainer_timeout_seconds={self.trainer_timeout_seconds:g} has no effect with trainer_ranks=1, which "
                "waits for nobody. Leave it out, or raise trainer_ranks"
            )
        if self.trainer_ranks == 1 and self.trainer_workers != "process":
            raise ValueError(
                f"trainer_workers={self.trainer_workers} has no effect with trainer_ranks=1, which is the run's own "
                "process. Leave it out, or raise trainer_ranks"
            )
        return self


class Fit(Section):
    """What `stage: pretrain` and `stage: sft` train on; the `rl` stage ignores it."""

    objective: Literal["masked_diffusion", "autoregressive", "causal_diffusion", "block_diffusion"] | None = Field(
        default=None,
        description="masked diffusion with weight 1/t; next-token prediction; masked diffusion that reads only what is "
        "to the left; or block by block, each with its own t. What is saved attends as it was trained; none: "
        "block_diffusion for a model that attends in blocks, else masked_diffusion",
    )
    block_length: int = Field(
        default=0, ge=0, description="of block_diffusion: positions of a block, B; 0 takes the model's, or else 4"
    )
    batch_size: Positive = Field(default=64, description="rows per optimizer step")
    micro_batch_size: int = Field(
        default=0,
        ge=0,
        description="rows per backward pass; the gradient does not depend on it; 0: all rows of a step at once, or of "
        "several trainer ranks each its share",
    )
    canvas: Positive = Field(
        default=256, description="response positions of a row that holds one sample, in tokens; longer ones are skipped"
    )
    context: int = Field(
        default=0,
        ge=0,
        description="positions of a row that packs several samples, which do not see each other, in tokens; samples "
        "that are longer are skipped, and plain text is cut; 0: one sample a row",
    )
    random_length: Fraction = Field(
        default=0.0, description="share of packed rows of plain text that end at a random length (LLaDA: 0.01)"
    )
    end_tokens: tuple[Positive, Positive] = Field(
        default=(1, 1), description="end tokens after a response: a number drawn from this range for each sample"
    )
    mask_ratio: tuple[Fraction, Fraction] = Field(default=(0.001, 1.0), description="range of t, uniform")
    noise_warmup_steps: int = Field(
        default=0,
        ge=0,
        description="steps in which t is drawn below a cap that rises to 1, and carries no weight; 0 is none",
    )
    noise_warmup_start: Fraction = Field(default=0.001, description="the cap at step 0")
    clipped_noise: Literal["none", "paper", "exact"] = Field(
        default="none",
        description="of block_diffusion: t is at least 1/B and every block has a mask; weight 1/t as published, or "
        "the inverse of a position's true chance of being masked",
    )
    attention_anneal_steps: int = Field(
        default=0,
        ge=0,
        description="of masked_diffusion: steps in which causal attention becomes full attention; 0 switches at once",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Fit:
        for name in ("mask_ratio", "end_tokens"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"fit.{name} must be a range (lo, hi) with lo <= hi; got ({low}, {high})")
        if self.clipped_noise != "none" and self.objective not in (None, "block_diffusion"):
            raise ValueError(
                f"fit.clipped_noise is of blocks: it goes with fit.objective=block_diffusion; got {self.objective!r}"
            )
        if self.attention_anneal_steps and self.objective not in (None, "masked_diffusion"):
            raise ValueError(
                "fit.attention_anneal_steps leads to full attention: it goes with fit.objective=masked_diffusion; got "
                f"{self.objective!r}"
            )
        if self.random_length and not self.context:
            raise ValueError("fit.random_length cuts packed rows; give their length, for example fit.context=4096")
        return self


class Recipe(Section):
    """A run. `stage` chooses the loop."""

    stage: Literal["rl", "sft", "pretrain"] = Field(description="rl: coupled-GRPO; sft, pretrain: likelihood training")
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$", description="first part of the run's folder name")
    seed: int = Field(default=0, ge=0, description="the root of every random draw")
    num_steps: Positive = Field(default=100, description="optimizer steps (sft, pretrain) or rollout steps (rl)")
    num_updates: Positive = Field(default=2, description="optimizer updates per rollout step, each with fresh masks")
    advantage: Literal["mean", "loo", "z", "softmax"] = Field(
        default="mean",
        description="reward minus the group's mean; leave-one-out mean; standardised; or the softmax of the rewards "
        "over the group minus that of their negatives (wd1)",
    )
    group_filter: Literal["none", "zero_std", "accuracy"] = Field(
        default="none",
        description="groups left out of the batch: none; those whose rewards are all equal; those whose share of "
        "passing completions is not inside accuracy_range. Nothing is rolled out in their place",
    )
    accuracy_range: tuple[Fraction, Fraction] = Field(
        default=(0.0, 1.0), description="open interval of the accuracy filter; (0, 1) wants some passes and some fails"
    )
    num_threads: int = Field(
        default=0,
        ge=0,
        description="torch threads of each process; 0 leaves torch's choice, shared among trainer_ranks",
    )
    output_dir: str = Field(default="runs", description="folder that run folders are made in")
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    estimator: Estimator = Estimator()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    reward: Rewards = Rewards()
    sandbox: Sandbox = Sandbox()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    fit: Fit = Fit()

    @property
    def fit_micro_batch_size(self) -> int:
        """`fit.micro_batch_size`, or where that is 0 a rank's share of the rows of a step, rounded up."""
        return self.fit.micro_batch_size or -(-self.fit.batch_size // self.cluster.trainer_ranks)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.rollout.denoising_steps > self.rollout.canvas:
            raise ValueError(
                f"rollout.denoising_steps ({self.rollout.denoising_steps}) must not exceed rollout.canvas "
                f"({self.rollout.canvas}): a step that unmasks nothing is wasted"
            )
        if self.cluster.lag and self.rollout.workers == "inline":
            raise ValueError(
                f"cluster.lag={self.cluster.lag} needs rollout workers that go on while this process trains: set "
                "rollout.workers to process or ray, or cluster.lag to 0"
            )
        if self.rollout.workers != "inline" and self.cluster.min_workers > self.rollout.num_workers:
            raise ValueError(
                f"cluster.min_workers ({self.cluster.min_workers}) must not exceed rollout.num_workers "
                f"({self.rollout.num_workers})"
            )
        low, high = self.accuracy_range
        if low >= high:
            raise ValueError(f"accuracy_range must be (lo, hi) with lo < hi; got ({low}, {high}); for example [0, 1]")
        if self.group_filter == "accuracy" and all(function.name != "code" for function in self.reward.functions):
            raise ValueError(
                "group_filter=accuracy needs hidden tests, and reward.functions has no 'code'; add it (its weight may "
                "be 0), or use group_filter=zero_std"
            )
        if self.model.has_cuda_graphs and self.cluster.trainer_ranks > 1 and self.model.adapter is None:
            raise ValueError(
                f"model.has_cuda_graphs=true goes with weights that stay where they are, and "
                f"cluster.trainer_ranks={self.cluster.trainer_ranks} shards all of them; leave it out, or train "
                "adapters (model.adapter)"
            )
        if self.optimizer.warmup_steps > self.num_steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must not exceed num_steps ({self.num_steps})"
            )
        return self


def _plain(value: Any) -> str:
    """A value as it is written in a recipe. Example: (0.2, 0.8) → [0.2, 0.8], None → null."""
    return json.dumps(value).strip('"')
