"""Checkpoints of a training run, by Orbax: sharded, written by all processes at once,
and restored onto any mesh.

Orbax is given a flat dictionary of plain arrays. JSON beside them says what they are,
with a fingerprint of each of them and of every array of the base.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from .._methods import check_frozen
from .._modules import without_views
from .._trees import Places
from .files import AdapterFileError, find_differences, list_problems
from .fingerprint import fingerprint, fingerprint_base, hash_content
from .settings import collect_frozen_settings, collect_state_settings, find_changes
from .state import (
    check_agreement,
    check_storable,
    describe_array,
    find_key_impl,
    find_misfits,
    from_json,
    from_raw,
    is_packed,
    make_raw_struct,
    name_leaves,
    split_state,
    to_json,
    to_raw,
)


_State = TypeVar("_State")

# Format 1 had no settings, and no dtypes narrower than a byte.
FORMAT = 2


class Checkpoints:
    """A folder of checkpoints from which a run goes on after it was interrupted.

    A checkpoint is there whole or not at all, whenever the processes that write it are
    killed. The next `Checkpoints` of the folder removes what they have left behind.
    Checkpoints are written while training goes on.

    With several processes, each of them does the same calls, and all must see the
    folder.

    !!! example

        ```python
        with lorax.Checkpoints("checkpoints", frozen, every=100) as checkpoints:
            first = 0
            if (found := checkpoints.restore((params, optimizer_state))) is not None:
                first, (params, optimizer_state) = found
            for i in range(first, steps):
                params, optimizer_state = step(params, optimizer_state, batch(i))
                checkpoints.save(i + 1, (params, optimizer_state))
        ```
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        frozen: Any,
        *,
        every: int = 1,
        keep: int = 2,
    ):
        """**Arguments:**

        - `folder`: The folder, which is made if it is not there. It may be a URL that
            Orbax knows, such as `gs://...`.
        - `frozen`: What is not trained, as `lorax.partition` returns it, or the whole
            plain model. Of this a checkpoint has a fingerprint of each array, and the
            static settings of its adapters, so that training does not go on with
            another base or dropout. `None` if there is none.
        - `every`: `save` only writes steps that are multiples of this.
        - `keep`: How many checkpoints are kept. Older ones are deleted when a new one
            is whole.

        **Raises:**

        `ImportError` without Orbax; `ValueError` unless `every` and `keep` are at least
        one; `NotADirectoryError` if `folder` is a file.
        """
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"`{name}={value}` must be at least 1.")
        try:
            import orbax.checkpoint as orbax
        except ImportError as error:
            raise ImportError(
                "`lorax.Checkpoints` writes with Orbax, which cannot be imported: "
                f"{error}. Install it with: pip install orbax-checkpoint"
            ) from error
        check_frozen(frozen, "lorax.Checkpoints(folder, {})")
        folder = os.fspath(folder)
        self._folder = folder if "://" in folder else os.path.abspath(folder)
        if os.path.isfile(self._folder):
            raise NotADirectoryError(
                f"`folder={folder!r}` is a file. Name a folder, which may be a new one."
            )
        self._every = every
        self._settings = collect_frozen_settings(frozen)
        plain = without_views(frozen, allow_scaled=True)
        self._base = fingerprint_base(Places(plain), ())
        self._orbax: Any = orbax
        self._manager: Any = orbax.CheckpointManager(
            self._folder,
            options=orbax.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is written. The end of a `with` block does the
        same."""
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint; `None` if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, *, force: bool = False) -> None:
        """Begins to write a checkpoint. The arrays of `state` may be donated after it.

        **Arguments:**

        - `step`: How many steps have been done.
        - `state`: All that training needs to go on: the `params` of `lorax.partition`,
            the state of the optimizer, keys. Arrays, typed keys and Python's numbers
            are saved; other leaves, such as functions, are not. With several processes,
            an array that is not on a mesh of all of them must be the same in each.
        - `force`: Whether to save even if `step` is no multiple of `every`, such as at
            the end.

        **Raises:**

        `ValueError` if there is a checkpoint of this step or of a later one, if there
        are no arrays, or if processes disagree on one. `TypeError` if an array is
        abstract. An error that happened in the background, while an earlier checkpoint
        was written, is raised here too.
        """
        if step % self._every and not force:
            return
        latest = self.latest
        if latest is not None and step <= latest:
            raise ValueError(
                f"`step={step}` is not after {latest}, the step of the last "
                f"checkpoint in {self._folder}. Begin with what `restore` returns, or "
                "use another folder."
            )
        arrays, values = split_state(state)
        check_storable(arrays)
        fingerprints = {name: fingerprint(x) for name, x in arrays.items()}
        check_agreement(step, fingerprints)
        about = json.dumps(
            {
                "format": FORMAT,
                "arrays": {
                    name: {
                        **describe_array(x),
                        "impl": find_key_impl(x),
                        "packed": is_packed(x),
                        "digest": fingerprints[name],
                    }
                    for name, x in arrays.items()
                },
                "values": {name: to_json(x) for name, x in values.items()},
                "base": self._base,
                "settings": self._settings | collect_state_settings(state),
            }
        )
        args = self._orbax.args
        self._manager.save(
            step,
            args=args.Composite(
                arrays=args.PyTreeSave(
                    {name: to_raw(x) for name, x in arrays.items() if x.size}
                ),
                about=args.JsonSave({"about": about, "digest": hash_content(about)}),
            ),
        )

    def restore(
        self,
        state: _State,
        *,
        allow_other_base: bool = False,
        allow_other_settings: bool = False,
    ) -> tuple[int, _State] | None:
        """The last checkpoint.

        **Arguments:**

        - `state`: The state that a run begins with, or its shapes
            (`jax.ShapeDtypeStruct`). Each array is restored with the sharding of the
            one here: the mesh, and the number of processes, need not be those that the
            checkpoint was written with.
        - `allow_other_base`: Whether base weights may differ from those of the run that
            was saved, which is otherwise an error.
        - `allow_other_settings`: Whether settings may differ that are in no array:
            `alpha`, `rank_stabilised`, the axes of factors, rates of dropout. Those of
            `state` and `frozen` are then used.

        **Returns:**

        The step, and a pytree of the structure of `state`; `None` if there is no
        checkpoint.

        **Raises:**

        `lorax.AdapterFileError`, a `ValueError`, if the checkpoint is damaged, was
        written by something else, is of another structure, or belongs to another base
        or to other settings. The message names the paths.
        """
        step = self.latest
        if step is None:
            return None
        about = self._about(step)
        written, base = about["arrays"], about["base"]
        arrays, values = split_state(state)
        wrong = list(find_misfits(written, about["values"], arrays, values))
        if wrong:
            raise AdapterFileError(
                f"{self._at(step)} does not fit `state`: {list_problems(wrong)}. "
                "Restore it with the settings that it was saved with, or use another "
                "folder."
            )
        other = list(find_differences(base, self._base))
        if other and not allow_other_base:
            raise AdapterFileError(
                f"{self._at(step)} was trained on another base than `frozen`: "
                f"{list_problems(other)}. Restore it with the base that it was "
                "trained on, or pass `allow_other_base=True` if these differences are "
                "meant."
            )
        # The two may have different entries: a plain model as `frozen` has none.
        settings = self._settings | collect_state_settings(state)
        changed = list(find_changes(about.get("settings", {}), settings))
        if changed and not allow_other_settings:
            raise AdapterFileError(
                f"{self._at(step)} was saved with other settings: "
                f"{list_problems(changed)}. Adapt the model with those that it was "
                "saved with, or pass `allow_other_settings=True` if these "
                "differences are meant."
            )
        packed = {name: x.get("packed", False) for name, x in written.items()}
        found = {
            name: from_raw(
                x, like=arrays[name], impl=written[name]["impl"], packed=packed[name]
            )
            for name, x in self._arrays(step, arrays, packed).items()
        }
        digests = {name: written[name]["digest"] for name in found}
        damaged = list(
            find_differences(digests, {n: fingerprint(x) for n, x in found.items()})
        )
        if damaged:
            raise self._damaged(step, list_problems(damaged))
        found |= {
            name: from_json(about["values"][name], like=x) for name, x in values.items()
        }
        leaves, treedef = jax.tree.flatten(state)
        pairs = zip(name_leaves(state), leaves, strict=True)
        return step, treedef.unflatten([found.get(name, x) for name, x in pairs])

    def _about(self, step: int) -> dict[str, Any]:
        args = self._orbax.args
        try:
            found = self._manager.restore(
                step, args=args.Composite(about=args.JsonRestore())
            )["about"]
            intact = found["digest"] == hash_content(found["about"])
            about = json.loads(found["about"])
            version = about["format"]
        # Orbax passes on errors of many kinds from the libraries that it uses.
        except Exception as error:
            raise self._damaged(step, error) from error
        if version > FORMAT:
            raise AdapterFileError(
                f"{self._at(step)} has format {version}; this version reads formats up "
                f"to {FORMAT}. Upgrade eqx-lorax."
            )
        if not intact:
            raise self._damaged(step, "its description is not as written")
        return about

    def _arrays(
        self, step: int, arrays: Mapping[str, Any], packed: Mapping[str, bool]
    ) -> dict[str, Any]:
        """Those that belong on a mesh as JAX's arrays there, the others as NumPy's."""
        args = self._orbax.args
        wanted = {name: make_raw_struct(x, packed[name]) for name, x in arrays.items()}
        filled = {name: x for name, x in wanted.items() if x.size}
        empty = {name: np.zeros(x.shape, x.dtype) for name, x in wanted.items()}
        if not filled:
            return empty
        how = {
            name: self._orbax.RestoreArgs(restore_type=np.ndarray)
            if x.sharding is None
            else self._orbax.ArrayRestoreArgs(sharding=x.sharding)
            for name, x in filled.items()
        }
        try:
            read = self._manager.restore(
                step,
                args=args.Composite(
                    arrays=args.PyTreeRestore(filled, restore_args=how)
                ),
            )["arrays"]
        except Exception as error:
            raise self._damaged(step, error) from error
        return {**empty, **read}

    def _damaged(self, step: int, problem: object) -> AdapterFileError:
        if isinstance(problem, Exception):
            # The messages of Orbax and TensorStore are pages long.
            first = (str(problem).strip().splitlines() or [""])[0][:200]
            problem = f"{type(problem).__name__}: {first}"
        before = [x for x in self._manager.all_steps() if x < step]
        then = f"resume from step {max(before)}" if before else "begin again"
        return AdapterFileError(
            f"{self._at(step)} is damaged, or no checkpoint of this library: "
            f"{str(problem).rstrip('.')}. Delete it to {then}."
        )

    def _at(self, step: int) -> str:
        return f"{self._folder}/{step}"
