"""The factor that keeps the gradients of a float16 run within float16's range."""

from dataclasses import dataclass


@dataclass
class LossScale:
    """What the loss is multiplied with before the backward pass, and the gradients are divided by before the step.

    The rule of the published runs, DeepSpeed's: twice as much after so many good steps in a row, half after a step
    whose gradients overflow. One overflow is forgiven between two growths.

    It counts overflows in all gradients of all processes, so every process has the same scale. (torch.amp.GradScaler
    looks at each process's own parameters, and cannot take sharded and whole ones together.)
    """

    value: float = 1.0
    window: int = 0  # good steps before it grows; 0: it stays
    good: int = 0  # in a row so far
    forgiven: bool = False
    overflows: int = 0  # in all

    def update(self, overflow: bool) -> None:
        """Take note of how a step went."""
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.overflows += 1
            if self.forgiven:
                self.value = max(self.value / 2, 1.0)
            self.forgiven = True
        elif self.window and self.good >= self.window:
            self.value, self.good, self.forgiven = 2 * self.value, 0, False

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale may still mend an overflow."""
        return self.value > 1
