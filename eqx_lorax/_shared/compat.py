"""Differences between versions of JAX, and readers for parts of a traced program that
JAX has no public function for."""

import inspect
import os
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.extend.core as jec
import jaxlib
import numpy as np


# JAX 0.11 has one class of jaxprs. Before, there are open and closed ones.
Jaxpr: TypeAlias = Any

_PACKAGES = tuple(
    os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep
    for module in (jax, jaxlib, eqx, np)
) + (os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,)


_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "stdlib"))


def close(jaxpr: Jaxpr) -> Jaxpr:
    """`jaxpr`, open or closed, as a closed one."""
    is_closed = isinstance(jaxpr, jec.ClosedJaxpr)
    return jaxpr if is_closed else jec.ClosedJaxpr(jaxpr, ())


def hoist_constants(jaxpr: Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """A jaxpr that takes its constants as its first inputs, and the constants."""
    inner = jaxpr.jaxpr
    taking = inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars])
    return taking, jaxpr.consts


def scan_counts(params: dict[str, Any], inputs: int) -> tuple[int, int]:
    """The number of constants and the number of carried values of a `scan`."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    parts = params["ft_in"].update(list(range(inputs))).unpack()
    consts, carry, _ = (len(list(part)) for part in parts)
    return consts, carry


def manual_axes(params: dict[str, Any]) -> frozenset[Any]:
    """The mesh axes that a `shard_map` maps over."""
    before_0_10 = "manual_axes" in params
    return params["manual_axes" if before_0_10 else "newly_manual_axes"]


def is_for_one_device(context: Any) -> bool:
    """Whether a rule for lowering is called for a program on a single device."""
    axes = context.module_context.axis_context
    return getattr(axes, "num_devices", None) == 1


def source_line(equation: Any) -> tuple[str, int] | None:
    """The file and line of the innermost call in the user's own code. If there is
    none, that in an installed package, such as the one that has the model."""
    stack = equation.source_info.traceback
    frames = [] if stack is None else stack.frames
    return _users_own((frame.file_name, frame.line_num) for frame in frames)


def calling_line() -> tuple[str, int] | None:
    """Like `source_line`, for the call that is being executed."""
    frames = traceback.walk_stack(inspect.currentframe())
    return _users_own((frame.f_code.co_filename, line) for frame, line in frames)


def is_library_code(jaxpr: Jaxpr) -> bool:
    """Whether `jaxpr` was traced from a function of a library. It may then come from
    a cache, and have been traced for another caller."""
    where = getattr(jaxpr.jaxpr.debug_info, "func_src_info", None) or ""
    return _is_library(where.rpartition(" at ")[2])


def _users_own(lines: Iterable[tuple[str, int]]) -> tuple[str, int] | None:
    lines = [line for line in lines if not _is_library(line[0])]
    own = [line for line in lines if not line[0].startswith(_INSTALLED)]
    return next(iter(own or lines), None)


def _is_library(file: str) -> bool:
    return file.startswith((*_PACKAGES, "<frozen"))
