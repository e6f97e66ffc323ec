"""The options of `adapter_config.json`: writing, checking and looking them up."""

import collections
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .matching import follows_pattern, make_pattern, make_targets


# The version of the format that is written: since 0.19 `A` of experts has their inputs.
FORMAT = "0.21.0"

# Options that do not change what a trained adapter computes.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_UNDERSTOOD = {
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "target_parameters",
    "use_dora",
    "use_rslora",
}
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
    "r": "where a rank belongs, a whole number above zero: that of `lora_A`",
    "lora_alpha": (
        "where a number belongs: the one that the adapter was trained with, which is "
        "in its training script and often `r` or twice that"
    ),
    "lora_dropout": "where a rate below 1 belongs: 0 will do",
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
    rank = _find_most_common(ranks.values())
    alpha = _find_most_common(alphas.values())
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
        "rank_pattern": {
            make_pattern(k, ranks): x for k, x in ranks.items() if x != rank
        },
        "lora_alpha": _to_integer(alpha),
        "alpha_pattern": {
            make_pattern(k, alphas): _to_integer(x)
            for k, x in alphas.items()
            if x != alpha
        },
        "use_rslora": rank_stabilised,
        "use_dora": use_dora,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        **of_parameters,
    }


def check_config(config: Any) -> None:
    """**Raises:**

    `ValueError` if the adapter is not plain LoRA. The message names the method or the
    option that it uses instead.
    """
    if not isinstance(config, dict):
        raise ValueError("it is not a JSON object")
    method = config.get("peft_type")
    if method != "LORA":
        raise ValueError(
            f"its `peft_type` is {method!r}; only 'LORA' can be read. "
            + _advise(method)
        )
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
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise ValueError(f"`bias={config['bias']!r}` is not known here")
    others = {
        key
        for key, value in config.items()
        if value and key not in _HARMLESS | _UNDERSTOOD
    }
    if others:
        raise ValueError(f"it uses {', '.join(sorted(others))}, which is not here")
    if wrong := list(_find_wrong_values(config)):
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


def _find_wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each option whose value is not of PEFT's type, in the words of
    JSON."""
    for option, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0.0)):
        value = config.get(option, default)
        if not _is_number(option, value):
            yield f"`{option}` is {json.dumps(value)}, {_BELONGS[option]}"
    for option, number in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict):
            yield f"`{option}` is {json.dumps(patterns)}, where an object belongs"
            continue
        for pattern, value in patterns.items():
            if not _is_number(number, value):
                yield (
                    f"`{option}` has {json.dumps(value)} for {pattern!r}, "
                    f"{_BELONGS[number]}"
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


def _is_number(option: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if option == "r":
        return isinstance(value, int) and value > 0
    return math.isfinite(value) and (option != "lora_dropout" or 0 <= value < 1)


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


def find_alpha(config: Mapping[str, Any], path: str) -> float:
    default = config.get("lora_alpha", 8)
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


def _find_most_common(values: Any) -> Any:
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else 8


def _to_integer(x: float) -> int | float:
    return int(x) if float(x).is_integer() else x
