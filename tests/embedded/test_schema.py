"""The schema is a strict subset of Dagger's: held against the SDK's generated client."""

import ast
import inspect
import textwrap
import typing
from pathlib import Path

import dagger
import httpx
import pytest
from dagger.client import gen
from graphql import (
    GraphQLEnumType,
    GraphQLField,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLOutputType,
    is_introspection_type,
    is_list_type,
    is_required_argument,
    is_specified_scalar_type,
)

from moonmind_ext.embedded import serve
from moonmind_ext.embedded.schema import make_schema, python_name

SCHEMA = make_schema()
OBJECTS = [
    type_
    for type_ in SCHEMA.type_map.values()
    if isinstance(type_, GraphQLObjectType) and not is_introspection_type(type_)
]
FIELDS = [(type_.name, name, field) for type_ in OBJECTS for name, field in type_.fields.items()]


def generated(type_name: str) -> type:
    name = {"Query": "Client"}.get(type_name, type_name)
    found: type = getattr(gen, name)
    return found


def method_of(type_name: str, field_name: str) -> typing.Any:
    found = getattr(generated(type_name), python_name(field_name), None)
    assert found is not None, f"the SDK has no {type_name}.{field_name}"
    return inspect.unwrap(found)


def graphql_names(method: typing.Any) -> tuple[str, dict[str, object]]:
    """Read in the SDK's source which field a method selects, and with which arguments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    field, arguments = "", dict[str, object]()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "Arg":
            name = ast.literal_eval(node.args[0])
            default = node.args[2] if len(node.args) > 2 else None
            arguments[name] = ast.unparse(default) if default is not None else ...
        if isinstance(node.func, ast.Attribute) and node.func.attr in {
            "_select",
            "_select_multiple",
        }:
            field = ast.literal_eval(node.args[0])
    return field, arguments


@pytest.mark.parametrize("type_", SCHEMA.type_map.values(), ids=str)
def test_every_type_is_one_of_daggers(type_: object) -> None:
    if is_introspection_type(type_) or is_specified_scalar_type(type_):  # type: ignore[arg-type]
        return
    assert generated(str(type_))


@pytest.mark.parametrize(
    ("type_name", "name", "field"), FIELDS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_field_is_selected_by_the_sdk_with_these_arguments(
    type_name: str, name: str, field: GraphQLField
) -> None:
    if name == "node":
        assert "node" in Path(inspect.getfile(dagger.client._core)).read_text()
        return
    method = method_of(type_name, name)
    selected, arguments = graphql_names(method)
    # `sync` is selected by the SDK's core.
    assert selected == name or name == "sync"
    parameters = inspect.signature(method).parameters
    for argument_name, argument in field.args.items():
        assert argument_name in arguments, f"no argument {argument_name}"
        parameter = parameters.get(python_name(argument_name))
        if parameter is not None:
            required = parameter.default is inspect.Parameter.empty
            assert is_required_argument(argument) == required, argument_name
    for argument_name, default in arguments.items():
        missing = argument_name not in field.args
        assert not (missing and default is ...), f"a required argument is missing: {argument_name}"


@pytest.mark.parametrize(
    ("type_name", "name", "field"), FIELDS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_field_gives_what_the_sdk_expects(
    type_name: str, name: str, field: GraphQLField
) -> None:
    if name == "node":
        return
    hint = inspect.signature(method_of(type_name, name)).return_annotation
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
    nullable = not isinstance(field.type, GraphQLNonNull)
    assert ("None" in text) == nullable or (nullable and text in OBJECT_NAMES)
    assert core_name(field.type, type_name, name) in text.replace("typing.", "")


OBJECT_NAMES = {type_.name for type_ in OBJECTS}


def core_name(type_: GraphQLOutputType, owner: str, name: str) -> str:
    inner = type_.of_type if isinstance(type_, GraphQLNonNull) else type_
    if is_list_type(inner):
        return "list"
    text = str(inner)
    if text == "ID":
        return "Self" if name == "sync" else "str"
    if text == owner:
        return ""  # Self, or its name.
    return {"String": "str", "Int": "int", "Boolean": "bool"}.get(text, text)


@pytest.mark.parametrize(
    "type_", [t for t in SCHEMA.type_map.values() if isinstance(t, GraphQLEnumType)], ids=str
)
def test_every_value_of_an_enum_is_one_of_daggers(type_: GraphQLEnumType) -> None:
    if not is_introspection_type(type_):
        assert set(type_.values) <= set(generated(type_.name).__members__)  # type: ignore[attr-defined]


async def post(port: int, token: str, query: str) -> httpx.Response:
    async with httpx.AsyncClient(auth=(token, ""), trust_env=False) as http:
        return await http.post(f"http://127.0.0.1:{port}/query", json={"query": query})


async def test_a_field_that_is_missing_here_is_named(sandbox: None, tmp_path: Path) -> None:
    async with serve(state_dir=tmp_path) as engine:
        answer = await post(engine.port, engine.token, "{container{asService{id}}}")
    message = answer.json()["errors"][0]["message"]
    assert message == "the embedded engine has no Container.asService; a real Dagger engine has"


async def test_without_the_token_there_is_no_answer(sandbox: None, tmp_path: Path) -> None:
    async with serve(state_dir=tmp_path) as engine:
        assert (await post(engine.port, "wrong", "{version}")).status_code == 401
        assert (await post(engine.port, engine.token, "{version}")).json() == {
            "data": {"version": engine.version}
        }


async def test_what_is_no_query_is_answered_with_an_error(sandbox: None, tmp_path: Path) -> None:
    async with serve(state_dir=tmp_path) as engine:
        answer = await post(engine.port, engine.token, "{")
    assert "Syntax Error" in answer.json()["errors"][0]["message"]
