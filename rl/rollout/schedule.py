"""The prompts and the requested completions of every training step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coupled.reward import Task
from coupled.rl.data.order import rows_of_step
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Prompt


class PromptSchedule:
    """Prompts and requests as a function of seed and step alone: a resumed run neither skips nor repeats a prompt.

    Args:
        num_prompts: prompts of a step.
        group_size: completions of a prompt.
    """

    def __init__(self, prompts: Sequence[Prompt], *, num_prompts: int, group_size: int, seed: int) -> None:
        self.prompts = prompts
        self._num_prompts = num_prompts
        self._group_size = group_size
        self._seed = seed
        self._tasks: dict[str, Task] = {}
        """uid → task of the requested completions."""

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of step `step` (from 1)."""
        chosen = rows_of_step(
            len(self.prompts), step=step - 1, per_step=self._num_prompts, seed=self._seed, stream="prompts"
        )
        return [self.prompts[i] for i in chosen]

    def uids_of(self, step: int) -> list[list[str]]:
        """Names of the step's completions, a list per prompt. Example: `step-3/0-task-17/2` is the third of the first
        prompt."""
        return [
            [f"step-{step}/{place}-{prompt.task.uid}/{sample}" for sample in range(self._group_size)]
            for place, prompt in enumerate(self.prompts_of(step))
        ]

    def requests_of(self, step: int) -> list[Request]:
        """The step's requests, group by group. Their tasks are known (`tasks_of`) until `forget`."""
        requests = []
        for prompt, uids in zip(self.prompts_of(step), self.uids_of(step), strict=True):
            self._tasks.update((uid, prompt.task) for uid in uids)
            requests += [Request(uid=uid, prompt_ids=prompt.token_ids) for uid in uids]
        return requests

    def tasks_of(self, uids: Sequence[str]) -> list[Task]:
        """The tasks of requested completions."""
        return [self._tasks[uid] for uid in uids]

    def forget(self, uids: Collection[str]) -> None:
        """Drop the tasks of a finished step."""
        for uid in uids:
            del self._tasks[uid]
