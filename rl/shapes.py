"""Shape annotations: checked during the tests, plain text everywhere else.

Suffix legend, used in every tensor file of this package:
    P  prompts in a step            G  completions per prompt (the group)
    B  rollouts in a batch, B = P·G C  completion canvas, in tokens
    S  prompt + canvas, in tokens   V  vocabulary
    N  positions picked out of [B, S] by a boolean mask
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:  # images that ship torch alone: annotations name only the tensor type there

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = _Unchecked

__all__ = ["Bool", "Float", "Int"]
