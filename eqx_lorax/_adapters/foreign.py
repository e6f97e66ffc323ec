"""Explaining files and folders that are no adapter of this library: what they are, and
what to do with them. Nothing in them is ever executed."""

import re
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open, SafetensorError


# The key of the metadata of this library's own files.
HEADER = "eqx_lorax"
READ_BY_PEFT = "a folder of PEFT's is read by `lorax.peft.load`."
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PICKLE = (
    "is a pickle of PyTorch's, which can run any code when it is opened, and never is "
    "here. If you trust it, convert it with PyTorch: `safetensors.torch.save_file("
    f'torch.load(path, weights_only=True), "{PEFT_WEIGHTS}")`.'
)
_FIRST_BYTES = {
    b"PK\x03\x04": _PICKLE,
    b"\x80": _PICKLE,
    b"version https://git-lfs": (
        "is a pointer of Git LFS in the place of a file, which `git lfs pull` fetches."
    ),
    b"GGUF": (
        "is a GGUF file, of llama.cpp. Load the adapter that it was converted from."
    ),
}
_BY_DIFFUSERS = (
    "Load it in PyTorch by diffusers, `pipeline.load_lora_weights(path)`, and write "
    "what PEFT then has: `peft.get_peft_model_state_dict(pipeline.unet, "
    "adapter_name=name)` by `safetensors.torch.save_file`, and the configuration by "
    "`pipeline.unet.peft_config[name].save_pretrained(folder)`."
)
_KOHYA = (
    "is in the style of kohya's scripts (`lora_down`, `lora_up`, and paths that have "
    f"lost their dots). {_BY_DIFFUSERS}"
)
_DIFFUSERS = f"is in the style of diffusers. {_BY_DIFFUSERS}"
_WHOLE_MODEL = (
    "holds a whole model and no adapter. Load it as the base; an adapter of PEFT's, "
    f"which `lorax.peft.load` reads, is a folder with `{PEFT_CONFIG}` and "
    f"`{PEFT_WEIGHTS}`."
)
# What a folder may have in the place of the weights of an adapter: the first match
# counts.
_IN_FOLDERS = {
    r"adapter_model[-.].*safetensors.*": (
        "has an adapter in parts, which no version of PEFT reads. Put them together: "
        "`from safetensors.torch import load_file, save_file`, then `save_file({name: "
        "x for part in parts for name, x in load_file(part).items()}, "
        f'"{PEFT_WEIGHTS}")`.'
    ),
    r"adapter_model.*\.(bin|pt|pth)": f"has no `{PEFT_WEIGHTS}`; what it has {_PICKLE}",
    r"pytorch_lora_weights\..*": f"has what {_DIFFUSERS}",
    r"(model|pytorch_model|diffusion_pytorch_model)[-.].*(safetensors|bin).*": (
        _WHOLE_MODEL
    ),
}


def explain_foreign_file(path: Path) -> str | None:
    """Says what the file at `path` is, by its first bytes; `None` if they do not
    tell."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = file.read(32)
    # The length of the header of a safetensors file may begin like anything.
    if start[4:9] == b"\0\0\0\0{":
        return None
    return next((x for key, x in _FIRST_BYTES.items() if start.startswith(key)), None)


def explain_foreign_tensors(names: Collection[str]) -> str | None:
    """Says what a file with tensors of these names is; `None` if it may be an adapter
    of PEFT's."""
    if any(re.search(r"\.lora_(down|up)\.weight$", name) for name in names):
        kohya = any(re.match(r"lora_[a-z0-9]+_", name) for name in names)
        return _KOHYA if kohya else _DIFFUSERS
    if any(re.search(r"[._]lora(_linear_layer)?\.(down|up)\.", name) for name in names):
        return _DIFFUSERS
    has_prefix = any(name.startswith("base_model.") for name in names)
    if names and not has_prefix and not any("lora_" in name for name in names):
        return _WHOLE_MODEL
    return None


def explain_foreign_folder(path: Path) -> str | None:
    """Says what the folder at `path` has in the place of the weights of an adapter."""
    inside = sorted(x.name for x in path.iterdir())
    for pattern, what in _IN_FOLDERS.items():
        if found := [name for name in inside if re.fullmatch(pattern, name)]:
            return f"({', '.join(found[:4])}) {what}"
    deeper = [x for x in inside if (path / x / PEFT_CONFIG).is_file()]
    if deeper:
        return f"has folders with adapters. Pass one of them: {', '.join(deeper[:8])}."
    return None


def explain_not_native(path: Path) -> str | None:
    """Says what is at `path`; `None` if `lorax.save_adapter` may have written it."""
    if (path / PEFT_CONFIG).is_file() or (path / PEFT_WEIGHTS).is_file():
        return f"is a folder: {READ_BY_PEFT}"
    return explain_foreign_file(path)


def is_native(path: Path) -> bool:
    """Whether `lorax.save_adapter` wrote the file."""
    try:
        with safe_open(path, "numpy") as file:
            return HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
