"""Reward functions: the built-in names, and functions of the user loaded from a file.

A user's function has the signature that TRL's GRPO reward functions have, sync or async:
`def score(prompts, completions, **columns) -> list[float | None]`. Columns are lists with one entry per
completion: the dataset's, and the task's own `uid`, `visible_tests`, `hidden_tests`, `entry_point` and
`setup`. A function without `**` gets the columns it names. None: not scored by this function.

`spec` names a function and its weight, `user` loads and calls a user's function, `process` does so in a process of its
own.
"""

from coupled.reward.functions.process import LOAD_SECONDS, FunctionProcess
from coupled.reward.functions.spec import BUILT_IN, RewardSpec

__all__ = ["BUILT_IN", "LOAD_SECONDS", "FunctionProcess", "RewardSpec"]
