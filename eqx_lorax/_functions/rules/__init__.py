"""What a primitive does to factored weights.

A rule takes the equation and its operands, at least one of which is a weight, and
returns the outputs, arrays or again weights. It raises `NotFactored` where only the
dense weight will do.
"""

from . import control_flow, linear, structural


LOOPS = control_flow.LOOPS
RULES = structural.RULES | linear.RULES | control_flow.RULES
