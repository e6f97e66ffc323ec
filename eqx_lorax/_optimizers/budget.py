"""The budget of AdaLoRA: how many triplets of all weights are left at each step."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Budget:
    """A schedule of three parts. Steps are counted from one."""

    total_steps: int
    warmup_steps: int
    final_steps: int
    interval: int

    def __post_init__(self):
        for name in ("total_steps", "warmup_steps", "final_steps", "interval"):
            value, least = getattr(self, name), int(name in ("total_steps", "interval"))
            if value < least:
                raise ValueError(f"`{name}={value}` has to be at least {least}.")
        if self.last <= self.warmup_steps:
            raise ValueError(
                f"`warmup_steps={self.warmup_steps}` and "
                f"`final_steps={self.final_steps}` leave none of "
                f"`total_steps={self.total_steps}`, in which triplets are pruned. Take "
                "fewer of them, or train longer."
            )

    @property
    def last(self) -> int:
        """The step that prunes for the last time."""
        return self.total_steps - self.final_steps

    def tabulate(self, start: int, target: int) -> np.ndarray:
        """How many triplets are left of `start` at the steps that are multiples of
        `interval`, up to the last that prunes: equation 11, with the fraction of PEFT,
        which is one where the warm-up ends."""
        steps = np.arange(0, self.last + 1, self.interval)
        done = (steps - self.warmup_steps) / (self.last - self.warmup_steps)
        budgets = ((start - target) * (1 - done) ** 3 + target).astype(np.int32)
        return np.where(steps <= self.warmup_steps, start, budgets)
