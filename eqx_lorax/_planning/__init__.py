from .plan import (
    Accelerator as Accelerator,
    Plan as Plan,
    plan as plan,
    StepBound as StepBound,
)
