"""What a primitive does to factored weights: rules, which register themselves."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar


# It takes the equation and its operands, at least one of which is factored, and returns
# the outputs, arrays or again factored. It raises `NotFactored` where only the dense
# weight will do.
Rule: TypeAlias = Callable[..., Sequence[Any]]

_Rule = TypeVar("_Rule", bound=Rule)
_RULES: dict[str, Rule] = {}
_MAKING_FUNCTIONS: set[Rule] = set()


def rule(*primitives: str, makes_functions: bool = False) -> Callable[[_Rule], _Rule]:
    """Registers a rule.

    **Arguments:**

    - `primitives`: The names of the primitives that it is for.
    - `makes_functions`: Whether it makes Python functions, which JAX would compile anew
        in every eager call.
    """

    def register(fn: _Rule) -> _Rule:
        for name in primitives:
            if name in _RULES:
                raise ValueError(f"The primitive `{name}` has two rules.")
            _RULES[name] = fn
        if makes_functions:
            _MAKING_FUNCTIONS.add(fn)
        return fn

    return register


def find_rule(primitive: str) -> Rule | None:
    """The rule for a primitive, if there is one."""
    return _RULES.get(primitive)


def makes_functions(rule: Rule) -> bool:
    """Whether the rule was registered with `makes_functions`."""
    return rule in _MAKING_FUNCTIONS
