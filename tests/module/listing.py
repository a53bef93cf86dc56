"""The module's declared API as text: what `dagger functions` and `--help` are made of."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pipelines.module import Moonmind

STORED = Path(__file__).with_name("api.txt")


def listing() -> str:
    """Give every object, field, function and argument with its documentation."""
    module: Any = Moonmind.__dagger_module__  # type: ignore[attr-defined]
    lines: list[str] = []
    for name, declared in sorted(module._objects.items()):
        lines += [f"{name}: {declared.cls.__doc__.splitlines()[0]}", ""]
        constructor = declared.get_constructor(module._converter)
        if constructor.parameters and name == "Moonmind":
            lines += ["  (constructor)", *_parameters(constructor), ""]
        for field_name, field in declared.fields.items():
            lines += [f"  {field_name} -> {_type(field.return_type)}", f"    {_doc(field)}", ""]
        for function_name, function in sorted(declared.functions.items()):
            if not function_name:
                continue
            cache = f" (cache: {function.cache_policy})" if function.cache_policy else ""
            lines += [f"  {function_name} -> {_type(function.return_type)}{cache}"]
            lines += [f"    {line}".rstrip() for line in (function.doc or "").splitlines()]
            lines += [*_parameters(function), ""]
    return "\n".join(lines).rstrip() + "\n"


def _parameters(function: Any) -> Iterator[str]:
    for parameter in function.parameters.values():
        extras = []
        if parameter.has_default:
            extras.append(f"default {json.dumps(parameter.signature.default)}")
        if parameter.default_path:
            extras.append(f"default path {parameter.default_path}")
        if parameter.ignore:
            extras.append(f"ignores {' '.join(parameter.ignore)}")
        shown = f", {', '.join(extras)}" if extras else ""
        yield f"    --{parameter.name}: {_type(parameter.resolved_type)}{shown}"
        yield f"        {parameter.doc}"


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("dagger.client.gen.", "")


def _doc(field: Any) -> str:
    from dagger.mod._utils import get_doc

    return get_doc(field.return_type) or ""
