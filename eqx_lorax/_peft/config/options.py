"""The options of `adapter_config.json`: writing, checking and looking them up."""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .matching import follows_pattern, make_pattern, make_targets


# The version of the format that is written: since 0.19 `A` of experts has their inputs.
FORMAT = "0.21.0"

# Options of all methods, which do not change what a trained adapter computes, or which
# are used to find its modules.
_COMMON = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one `peft_type`."""

    others: frozenset[str]
    """Its own options that are understood, or do not matter."""
    rank: str | None = "r"
    alpha: str | None = "lora_alpha"
    dropout: str | None = "lora_dropout"
    """The names of these options; `None` where there is none."""
    has_patterns: bool = True
    """Whether ranks and alphas may differ by patterns."""
    biases: tuple[str, ...] = ("none",)
    """The values of `bias` that are read."""

    @property
    def names(self) -> set[str]:
        """All options that are understood."""
        own = {self.rank, self.alpha, self.dropout} - {None}
        patterns = {"rank_pattern", "alpha_pattern"} if self.has_patterns else set()
        return {*_COMMON, *self.others, *(x for x in own if x), *patterns, "bias"}


LORA = Options(
    frozenset(
        {
            "ensure_weight_tying",
            "eva_config",
            "fan_in_fan_out",
            "init_lora_weights",
            "lora_bias",
            "megatron_core",
            "qalora_group_size",
            "target_parameters",
            "trainable_token_indices",
            "use_dora",
            "use_rslora",
        }
    ),
    biases=("none", "all", "lora_only"),
)
# Methods that train inputs of a model, and no weights.
_ON_INPUTS = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
}
_BELONGS = {
    "rank": "where a rank belongs, a whole number above zero: that of `lora_A`",
    "alpha": (
        "where a number belongs: the one that the adapter was trained with, which is "
        "in its training script and often `r` or twice that"
    ),
    "dropout": "where a rate below 1 belongs: 0 will do",
}
# With these PEFT changes the base as well.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def make_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    parameters: Sequence[str],
    modules: Iterable[str],
    rank_stabilised: bool,
    use_dora: bool,
    dropout: float,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The configuration of adapters.

    **Arguments:**

    - `ranks`, `alphas`: The rank and the alpha of each adapted module or parameter, by
        its path.
    - `parameters`: Those of these paths that are paths of parameters.
    - `modules`: The paths of all modules of the model that are known.
    """
    rank, rank_pattern = make_patterns(ranks)
    alpha, alpha_pattern = make_patterns(alphas)
    targets = [path for path in ranks if path not in parameters]
    # The oldest versions refuse options that they do not know.
    of_parameters = {"target_parameters": list(parameters), "peft_version": FORMAT}
    of_parameters = of_parameters if parameters else {}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        # Anything else makes PEFT change the base when it loads the adapter.
        "init_lora_weights": True,
        "target_modules": make_targets(targets, modules)
        if targets or not ranks
        else [],
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rank_stabilised,
        "use_dora": use_dora,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        **of_parameters,
    }


def make_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common of some numbers, by paths, and a pattern for each path that has
    another one."""
    counted = collections.Counter(values.values()).most_common(1)
    default = counted[0][0] if counted else 8
    return _to_integer(default), {
        make_pattern(path, values): _to_integer(x)
        for path, x in values.items()
        if x != default
    }


def check_config(config: Any, known: Mapping[str, Options]) -> None:
    """**Arguments:**

    - `known`: The options of each `peft_type` that can be read.

    **Raises:**

    `ValueError` if the adapter is of none of them, or uses any other option. The
    message names it.
    """
    if not isinstance(config, dict):
        raise ValueError("it is not a JSON object")
    method = config.get("peft_type")
    if not isinstance(method, str) or method not in known:
        raise ValueError(
            f"its `peft_type` is {method!r}; only {', '.join(map(repr, known))} can be "
            f"read. {_advise(method)}"
        )
    options = known[method]
    if config.get("use_dora") and config.get("lora_bias"):
        raise ValueError(
            "it has both `use_dora` and `lora_bias`, which PEFT itself refuses: set to "
            "false the one that it was not trained with"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"`init_lora_weights={init!r}` has changed the base that it was trained "
            "on. Save it in PEFT with `path_initial_model_for_weight_conversion`, "
            "which makes it plain LoRA on the original base"
        )
    bias = config.get("bias")
    if bias is not None and bias not in options.biases:
        raise ValueError(f"`bias={bias!r}` is not known here. {_advise(method)}")
    others = {
        key for key, value in config.items() if value and key not in options.names
    }
    if others:
        raise ValueError(
            f"it uses {', '.join(sorted(others))}, which is not here. {_advise(method)}"
        )
    if wrong := list(_find_wrong_values(config, options)):
        raise ValueError("; ".join(wrong))


def _advise(method: Any) -> str:
    if method is None:
        return "Without one it is no configuration of PEFT's: see which file this is"
    if str(method) in _ON_INPUTS:
        return "This one trains inputs of a model, and none of its weights"
    return (
        "Merge it in PyTorch, by `merge_and_unload()`, and load the weights of the "
        "merged model here"
    )


def _find_wrong_values(config: Mapping[str, Any], options: Options) -> Iterator[str]:
    """A line for each option whose value is not of PEFT's type, in the words of
    JSON."""
    for kind, default in (("rank", 8), ("alpha", 8), ("dropout", 0.0)):
        option = getattr(options, kind)
        value = config.get(option, default)
        if option is not None and not _is_number(kind, value):
            yield f"`{option}` is {json.dumps(value)}, {_BELONGS[kind]}"
    numbers = (("rank_pattern", "rank"), ("alpha_pattern", "alpha"))
    for option, kind in numbers if options.has_patterns else ():
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict):
            yield f"`{option}` is {json.dumps(patterns)}, where an object belongs"
            continue
        for pattern, value in patterns.items():
            if not _is_number(kind, value):
                yield (
                    f"`{option}` has {json.dumps(value)} for {pattern!r}, "
                    f"{_BELONGS[kind]}"
                )
            yield from _check_expression(option, pattern)
    for option in ("target_modules", "exclude_modules"):
        if isinstance(value := config.get(option), str):
            yield from _check_expression(option, value)
        else:
            yield from _check_list(option, value)
    if isinstance(value := config.get("layers_pattern"), str):
        yield from _check_expression("layers_pattern", value)
    else:
        yield from _check_list("layers_pattern", value)
        for entry in value if isinstance(value, list) else []:
            yield from _check_expression("layers_pattern", entry)
    layers = config.get("layers_to_transform") or 0
    if not all(isinstance(x, int) for x in _as_list(layers)):
        yield (
            f"`layers_to_transform` is {json.dumps(layers)}, where whole numbers belong"
        )
    for option in ("target_parameters", "modules_to_save"):
        yield from _check_list(option, config.get(option))
    whole = config.get("modules_to_save")
    for entry in whole if isinstance(whole, list) else []:
        yield from _check_expression("modules_to_save", entry)


def _is_number(kind: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == "rank":
        return isinstance(value, int) and value > 0
    return math.isfinite(value) and (kind != "dropout" or 0 <= value < 1)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_list(option: str, value: Any) -> Iterator[str]:
    is_list = isinstance(value, list) and all(isinstance(x, str) for x in value)
    if value is not None and not is_list:
        yield f"`{option}` is {json.dumps(value)}, where a list of names belongs"


def _check_expression(option: str, pattern: Any) -> Iterator[str]:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        yield f"`{option}` has {pattern!r}, no regular expression: {error}"


def find_rank(config: Mapping[str, Any], path: str) -> int:
    return int(_find_by_pattern(config.get("rank_pattern"), path, config.get("r", 8)))


def find_alpha(
    config: Mapping[str, Any], path: str, option: str = "lora_alpha"
) -> float:
    default = config.get(option, 8)
    return float(_find_by_pattern(config.get("alpha_pattern"), path, default))


def _find_by_pattern(
    patterns: Mapping[str, Any] | None, path: str, default: Any
) -> Any:
    """The value of the first pattern that matches the path or the end of it, as in
    PEFT."""
    for pattern, value in (patterns or {}).items():
        if follows_pattern(pattern, path):
            return value
    return default


def _to_integer(x: int | float) -> int | float:
    return int(x) if float(x).is_integer() else x
