"""The package as the API pages show it: a module `lorax` with the public names alone.

This is an extension of Griffe, with which mkdocstrings reads the package. Types that
are not public are shown as what they stand for, classes have the `__init__` that their
fields make, and attributes are a list.
"""

import ast
import dataclasses
from typing import Any

import griffe


DOORS = {"": "eqx_lorax", "peft": "eqx_lorax.peft", "quantised": "eqx_lorax.quantised"}

# What is shown for long unions. Other types that are not public are shown as values.
SHOWN = {
    "AnyArray": "Array",
    "Base": "Any",
    "Keys": "PRNGKeyArray",
    "Label": "str | int",
    "Labels": "Sequence[str | int]",
    "Weight": "Array | AbstractLoraWeight",
    "Weights": "Sequence[ArrayLike] | Array",
}

# Classes that are made by functions of the library, so that no call of them is shown.
RESULTS = {
    *("Calibration", "Fresh", "HeldArrays", "Info", "KeyPath", "Plan"),
    *("QuantisationError", "QuantisedArray", "Spectra", "StepBound", "Summary"),
    *("TargetError", "TargetSpectrum", "TargetSummary"),
}

# Of some classes not all attributes are for users.
ATTRIBUTES = {
    "AbstractLoraLayer": ("wrapped",),
    "AbstractLoraWeight": ("w", "shape", "dtype", "ndim", "size", "T", "mT"),
    "AbstractSidedWeight": ("axes", "batch_shape", "rank"),
    "AbstractStart": ("changes_base",),
    "LoraWeight": ("rank", "scale"),
    "QuantisedArray": ("shape", "dtype", "ndim", "size", "nbytes", "T", "mT"),
}


class PublicNames(griffe.Extension):
    """Fills the module `lorax`, a file here that is empty, when it is loaded."""

    def on_module(
        self, *, mod: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any
    ) -> None:
        if mod.path != "lorax":
            return
        loader.resolve_aliases(implicit=False, external=False)
        found = _Found(loader)
        for inner, path in DOORS.items():
            door = loader.modules_collection[path]
            module = mod
            if inner:
                module = griffe.Module(inner, docstring=door.docstring, parent=mod)
                mod.set_member(inner, module)
            for name in public_names(door):
                alias = griffe.Alias(name, found.targets[path, name], parent=module)
                module.set_member(name, alias)
        for target in found.objects:
            found.show(target)


def public_names(door: griffe.Module) -> list[str]:
    """The names of a module that are for users."""
    if door.exports is not None:
        return [str(name) for name in door.exports]
    return [
        name
        for name, member in door.members.items()
        if member.is_alias and not name.startswith("_") and _is_reexport(member, door)
    ]


def _is_reexport(alias: Any, door: griffe.Module) -> bool:
    path = alias.target_path
    return path.startswith("eqx_lorax._") and path != f"{door.path}.{alias.name}"


class _NotPublic(ValueError):
    """A type that is not public, and has no other form."""


class _Found:
    """The public objects, and how their types are shown."""

    def __init__(self, loader: griffe.GriffeLoader):
        self.collection = loader.modules_collection
        self.targets: dict[tuple[str, str], griffe.Object] = {}
        for path in DOORS.values():
            for name in public_names(self.collection[path]):
                self.targets[path, name] = self.final(f"{path}.{name}")
        self.objects = list({id(x): x for x in self.targets.values()}.values())
        self.public = {x.path for x in self.objects}

    def final(self, path: str) -> griffe.Object:
        """What `path` names. A file may be called as what is defined in it."""
        found = self.collection[path]
        found = found.final_target if found.is_alias else found
        while found.is_module and found.name in found.members:
            found = found.members[found.name]
            found = found.final_target if found.is_alias else found
        return found

    def show(self, target: griffe.Object) -> None:
        """Replaces private types in a public object, and lists attributes."""
        if isinstance(target, griffe.Class):
            if target.name in RESULTS:
                target.members.pop("__init__", None)
            else:
                _add_init(target)
            for name, member in list(target.members.items()):
                if name == "__init__" or not name.startswith("_"):
                    try:
                        self._show_types(member)
                    except _NotPublic:
                        target.members.pop(name)  # an internal of the class
            _list_attributes(target)
        else:
            self._show_types(target)
            if isinstance(target, griffe.Attribute):
                target.value = self._shown(target.value)
                if str(target.annotation) == "TypeAlias":
                    target.annotation = None

    def _show_types(self, member: Any) -> None:
        if isinstance(member, griffe.Function):
            for parameter in member.parameters:
                if parameter.name in ("self", "cls"):
                    parameter.annotation = None
                parameter.annotation = self._shown(parameter.annotation)
            member.returns = self._shown(member.returns)
        elif isinstance(member, griffe.Attribute):
            member.annotation = self._shown(member.annotation)

    def _shown(self, expression: Any) -> Any:
        """`expression` with what its private names stand for."""
        if isinstance(expression, griffe.ExprName):
            return self._shown_name(expression)
        if isinstance(expression, griffe.ExprSubscript):
            if expression.canonical_path == "equinox.AbstractVar":
                return self._shown(expression.slice)
        if isinstance(expression, griffe.Expr):
            changes = {}
            for field in dataclasses.fields(expression):
                value = getattr(expression, field.name)
                if isinstance(value, list | tuple):
                    changes[field.name] = [self._shown(x) for x in value]
                elif isinstance(value, griffe.Expr):
                    changes[field.name] = self._shown(value)
            return dataclasses.replace(expression, **changes)
        if isinstance(expression, str) and expression[:1] in "'\"":
            name = expression[1:-1]  # of a class that is defined further below
            if ("eqx_lorax", name) in self.targets:
                return _parse(name, self.collection["eqx_lorax"])
        return expression

    def _shown_name(self, name: griffe.ExprName) -> Any:
        path = name.canonical_path
        if not path.startswith("eqx_lorax."):
            return name
        if name.name in SHOWN:
            return _parse(SHOWN[name.name], self.collection["eqx_lorax"])
        try:
            found = self.final(path)
        except griffe.AliasResolutionError:  # of another package
            return griffe.ExprName(name.name)
        if found.path in self.public:
            return name
        if name.name.startswith("_"):  # a type variable
            return griffe.ExprName(name.name.lstrip("_"))
        if isinstance(found, griffe.Attribute) and found.value is not None:
            return self._shown(found.value)
        raise _NotPublic(f"{path} is in a public signature, and is not public.")


def _parse(text: str, scope: griffe.Module) -> Any:
    return griffe.get_expression(ast.parse(text, mode="eval").body, parent=scope)


def _fields(target: griffe.Class) -> dict[str, griffe.Attribute]:
    """What a class declares for each of its instances, in order."""
    fields = {}
    for name, member in target.members.items():
        if not isinstance(member, griffe.Attribute) or name.startswith("_"):
            continue
        is_field = member.annotation is not None and "property" not in member.labels
        if is_field and "instance-attribute" in member.labels:
            fields[name] = member
    return fields


def _add_init(target: griffe.Class) -> None:
    """The `__init__` that Equinox makes of the fields of a module that has no other."""
    is_abstract = target.name.startswith("Abstract")
    fields = _fields(target)
    if is_abstract or not fields or "__init__" in target.members:
        return
    parameters = [griffe.Parameter("self")]
    for name, field in fields.items():
        default = field.value
        if isinstance(default, griffe.ExprCall) and str(default).startswith(
            "eqx.field"
        ):
            given = {x.name: x.value for x in default.arguments if hasattr(x, "name")}
            default = given.get("default")
        kind = griffe.ParameterKind.positional_or_keyword
        annotation = field.annotation
        parameters.append(
            griffe.Parameter(name, annotation=annotation, default=default, kind=kind)
        )
    init = griffe.Function(
        "__init__",
        parameters=griffe.Parameters(*parameters),
        parent=target,
        lineno=0,
        endlineno=0,
    )
    target.set_member("__init__", init)


def _list_attributes(target: griffe.Class) -> None:
    """Puts what `__init__` says into the docstring, and fields and properties as lists,
    and takes these out of the members. Sources come last."""
    init = target.members.get("__init__")
    names = {x.name for x in init.parameters} if init is not None else set()
    listed: dict[str, list[str]] = {"**Arguments:**": [], "**Attributes:**": []}
    for name, member in list(target.members.items()):
        if not isinstance(member, griffe.Attribute) or member.docstring is None:
            continue
        if name.startswith("_") or name not in ATTRIBUTES.get(target.name, (name,)):
            continue
        target.members.pop(name)
        text = member.docstring.value.replace("\n", "\n    ")
        title = "**Arguments:**" if name in names else "**Attributes:**"
        type_ = f": {member.annotation}" if member.annotation is not None else ""
        listed[title].append(f"- `{name}{type_}`: {text}")
    assert target.docstring is not None
    text, cite, sources = target.docstring.value.partition("??? cite")
    if init is not None and init.docstring is not None:
        text = text.rstrip() + "\n\n" + init.docstring.value + "\n\n"
        init.docstring = None
    for title, lines in listed.items():
        if lines:
            text = text.rstrip() + "\n\n" + "\n".join([title, "", *lines]) + "\n\n"
    target.docstring.value = text + cite + sources
