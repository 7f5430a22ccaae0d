"""The `model` section: checkpoint, family, adapters, precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from coupled.rl.recipe.section import Positive, Section


class Adapter(Section):
    """LoRA: train low-rank adapters instead of all weights."""

    rank: Positive = Field(default=16, description="rank of the update matrices")
    alpha: float = Field(default=32.0, gt=0, description="scale of the update: alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="names of the linear layers that get adapters",
    )


class Model(Section):
    """The checkpoint or fresh weights to train, and the precision of the computation."""

    path: str = Field(description="checkpoint folder (relative to the recipe file), or a hub name 'owner/name'")
    init: Literal["checkpoint", "random"] = Field(
        default="checkpoint",
        description="'random' reads only config.json and the tokenizer, and draws the weights",
    )
    family: str | None = Field(default=None, description="model family; none: the checkpoint's")
    shift: Annotated[int, Field(ge=0, le=1)] | None = Field(
        default=None, description="logit shift, 0 or 1; none: the family's"
    )
    block_length: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="positions of a block of attention; 0: attention to the whole sequence; none: the family's",
    )
    mask_token: str | None = Field(
        default=None,
        description="the token that means MASK; a new one is added to an autoregressive model; none: the checkpoint's",
    )
    end_tokens: tuple[str, ...] = Field(
        default=(), description="tokens that end a completion; none: the checkpoint's and the family's"
    )
    trust_remote_code: bool = Field(
        default=False, description="run the modelling code in the checkpoint's folder; model families do not need it"
    )
    adapter: Adapter | None = Field(default=None, description="LoRA adapters; none: train all weights")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: the forward pass runs under autocast; log-softmax stays fp32"
    )
    weights_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="precision of the weights under an adapter; bfloat16 halves their memory",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: a GPU if there is one, else the CPU"
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
                "weights in bfloat16 cannot compute in float32; also set model.compute_dtype=bfloat16, or leave "
                "model.weights_dtype out"
            )
        if self.weights_dtype != "float32" and self.adapter is None:
            raise ValueError(
                "weights that are trained must be float32, because bfloat16 rounds small updates away; got "
                f"model.weights_dtype={self.weights_dtype!r} without model.adapter. Use model.compute_dtype=bfloat16 "
                "for speed, or train an adapter"
            )
        return self
