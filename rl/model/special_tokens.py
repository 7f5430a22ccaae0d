"""The tokens with a meaning for diffusion: MASK, and those that end a completion."""

from __future__ import annotations

from typing import Any

from coupled.rl.errors import CheckpointError
from coupled.rl.model.families import Family


def find_mask_id(tokenizer: Any, config: Any, family: Family) -> int:
    """Id of MASK: from the tokenizer, else from `config.json`, else the family's by name, else the family's by number.

    Raises:
        CheckpointError: none of them names one.
    """
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if getattr(config, "mask_token_id", None) is not None:
        return int(config.mask_token_id)
    if family.mask_token is not None and (found := _known_ids(tokenizer, (family.mask_token,))):
        return found[0]
    if family.mask_id is not None:
        return family.mask_id
    raise CheckpointError(
        "a diffusion model needs a mask token: neither tokenizer.mask_token nor config.mask_token_id is set; "
        "set model.mask_token, to a token of the checkpoint that is to be reused or to a new one"
    )


def find_end_ids(tokenizer: Any, config: Any, family: Family) -> tuple[int, ...]:
    """Ids that end a completion, ascending: those stated in the configuration, else the tokenizer's end and pad tokens
    together with the family's.

    Raises:
        CheckpointError: there is none.
    """
    stated = (getattr(config, "diffusion", None) or {}).get("end_ids")
    if stated:
        return tuple(sorted(stated))
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id, *_known_ids(tokenizer, family.end_tokens)} - {None}
    if not ids:
        raise CheckpointError(
            "the tokenizer names no end token (tokenizer.eos_token), so no completion would ever end; set "
            "model.end_tokens to the tokens that end one"
        )
    return tuple(sorted(ids))


def _known_ids(tokenizer: Any, names: tuple[str, ...]) -> list[int]:
    vocabulary = tokenizer.get_vocab() if names else {}
    return [vocabulary[name] for name in names if name in vocabulary]
