"""The rules: what each primitive does to factored weights.

To import this room is to register them. A rule for one more primitive is a function
below `@rule("its name")` in the file of its kind; the interpreter knows none by name.
"""

from . import (
    control_flow as control_flow,
    linear as linear,
    structural as structural,
)
