"""Plans: the memory, the operations and the least time of a training step, from its
traced program alone.

What is trained, and the table of an adapted model, are in `_training`. Nothing here
runs a program or allocates an array.
"""

from .held import HeldArrays as HeldArrays
from .plan import (
    Accelerator as Accelerator,
    Plan as Plan,
    plan as plan,
    StepBound as StepBound,
)
