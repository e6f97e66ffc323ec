"""`adapter_config.json` of PEFT."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .matching import follows_pattern, pattern_for, targets_for


# The version of the format that is written: since 0.19 `A` of experts has their inputs.
FORMAT = "0.21.0"

# What says nothing about the adapter's arithmetic once it is trained.
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
    "use_rslora",
}
# With these PEFT changes the base as well.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def new_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    parameters: Sequence[str],
    modules: Iterable[str],
    rank_stabilised: bool,
    dropout: float,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The configuration of adapters with these ranks and alphas, by their paths, those
    at `parameters` being of parameters and the others of `modules`, which are all that
    are known of the model."""
    rank = _most_common(ranks.values())
    alpha = _most_common(alphas.values())
    targets = [path for path in ranks if path not in parameters]
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        # Anything else makes PEFT change the base when it loads the adapter.
        "init_lora_weights": True,
        "target_modules": targets_for(targets, modules) if targets or not ranks else [],
        "target_parameters": list(parameters) or None,
        "r": rank,
        "rank_pattern": {
            pattern_for(k, ranks): x for k, x in ranks.items() if x != rank
        },
        "lora_alpha": _whole(alpha),
        "alpha_pattern": {
            pattern_for(k, alphas): _whole(x) for k, x in alphas.items() if x != alpha
        },
        "use_rslora": rank_stabilised,
        "use_dora": False,
        "lora_dropout": dropout,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "peft_version": FORMAT,
    }


def check_config(config: Any) -> None:
    """**Raises:**

    `ValueError` if the adapter is not plain LoRA, with the method or option that it has
    instead.
    """
    if not isinstance(config, dict):
        raise ValueError("it is not a JSON object")
    method = config.get("peft_type")
    if method != "LORA":
        raise ValueError(f"its `peft_type` is {method!r}; what can be read is 'LORA'")
    if config.get("use_dora"):
        raise ValueError("it is DoRA (`use_dora`), which is not here yet")
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


def rank_of(config: Mapping[str, Any], path: str) -> int:
    return int(_by_pattern(config.get("rank_pattern"), path, config.get("r", 8)))


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    default = config.get("lora_alpha", 8)
    return float(_by_pattern(config.get("alpha_pattern"), path, default))


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """As PEFT does: the first pattern that matches the path or the end of it."""
    for pattern, value in (patterns or {}).items():
        if follows_pattern(pattern, path):
            return value
    return default


def _most_common(values: Any) -> Any:
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else 8


def _whole(x: float) -> int | float:
    return int(x) if float(x).is_integer() else x
