"""The part of Dagger's schema that is here, and how its fields find their methods.

A strict subset: no type, field, argument or value that a real engine has not, and
of what is here the same types. A test holds it against the SDK's generated client.
"""

import keyword
import re
from collections.abc import Awaitable, Mapping
from typing import Any

from graphql import (
    FieldNode,
    GraphQLError,
    GraphQLResolveInfo,
    GraphQLSchema,
    ValidationRule,
    build_schema,
    execute,
    parse,
    specified_rules,
    validate,
)
from graphql.validation import FieldsOnCorrectTypeRule

SDL = """
interface Node { id: ID! }

type Query {
  version: String!
  container: Container!
  directory: Directory!
  file(name: String!, contents: String!, permissions: Int): File!
  host: Host!
  cacheVolume(key: String!): CacheVolume!
  setSecret(name: String!, plaintext: String!): Secret!
  secret(uri: String!): Secret!
  node(id: ID!): Node
}

type Host implements Node {
  id: ID!
  directory(
    path: String!
    exclude: [String!] = []
    include: [String!] = []
    noCache: Boolean = false
    gitignore: Boolean = false
  ): Directory!
  file(path: String!, noCache: Boolean = false): File!
}

enum ReturnType { SUCCESS FAILURE ANY }
enum CacheSharingMode { SHARED PRIVATE LOCKED }
enum ExistsType { REGULAR_TYPE DIRECTORY_TYPE SYMLINK_TYPE }
enum FileType { UNKNOWN REGULAR DIRECTORY SYMLINK }

type Container implements Node {
  id: ID!
  sync: ID!
  from(address: String!): Container!
  imageRef: String!
  withExec(
    args: [String!]!
    useEntrypoint: Boolean = false
    stdin: String = ""
    redirectStdin: String = ""
    redirectStdout: String = ""
    redirectStderr: String = ""
    expect: ReturnType = SUCCESS
    experimentalPrivilegedNesting: Boolean = false
    insecureRootCapabilities: Boolean = false
  ): Container!
  exitCode: Int!
  stdout: String!
  stderr: String!
  combinedOutput: String!
  withEnvVariable(name: String!, value: String!, expand: Boolean = false): Container!
  withoutEnvVariable(name: String!): Container!
  envVariable(name: String!): String
  envVariables: [EnvVariable!]!
  withVolatileVariable(name: String!, value: String!): Container!
  withoutVolatileVariable(name: String!): Container!
  withSecretVariable(name: String!, secret: ID!): Container!
  withoutSecretVariable(name: String!): Container!
  withMountedDirectory(
    path: String!
    source: ID!
    owner: String = ""
    readOnly: Boolean = false
  ): Container!
  withMountedFile(path: String!, source: ID!, owner: String = ""): Container!
  withMountedCache(
    path: String!
    cache: ID!
    sharing: CacheSharingMode = SHARED
    owner: String = ""
  ): Container!
  withMountedTemp(path: String!, size: Int): Container!
  withMountedSecret(path: String!, source: ID!, owner: String = "", mode: Int = 256): Container!
  withoutMount(path: String!): Container!
  mounts: [String!]!
  withDirectory(
    path: String!
    source: ID!
    exclude: [String!] = []
    include: [String!] = []
    gitignore: Boolean = false
    owner: String = ""
  ): Container!
  withFile(path: String!, source: ID!, permissions: Int, owner: String = ""): Container!
  withNewFile(
    path: String!
    contents: String!
    permissions: Int = 420
    owner: String = ""
  ): Container!
  withUser(name: String!): Container!
  user: String!
  withWorkdir(path: String!): Container!
  workdir: String!
  withEntrypoint(args: [String!]!, keepDefaultArgs: Boolean = false): Container!
  entrypoint: [String!]!
  withDefaultArgs(args: [String!]!): Container!
  withoutDefaultArgs: Container!
  defaultArgs: [String!]!
  exists(
    path: String!
    expectedType: ExistsType
    doNotFollowSymlinks: Boolean = false
  ): Boolean!
  directory(path: String!): Directory!
  file(path: String!): File!
}

type Directory implements Node {
  id: ID!
  sync: ID!
  name: String!
  digest: String!
  entries(path: String): [String!]!
  glob(pattern: String!): [String!]!
  exists(
    path: String!
    expectedType: ExistsType
    doNotFollowSymlinks: Boolean = false
  ): Boolean!
  stat(path: String!, doNotFollowSymlinks: Boolean = false): Stat
  directory(path: String!): Directory!
  file(path: String!): File!
  withDirectory(
    path: String!
    source: ID!
    exclude: [String!] = []
    include: [String!] = []
    gitignore: Boolean = false
    owner: String = ""
  ): Directory!
  withFile(path: String!, source: ID!, permissions: Int, owner: String = ""): Directory!
  withNewFile(path: String!, contents: String!, permissions: Int = 420): Directory!
  withNewDirectory(path: String!, permissions: Int = 420): Directory!
  withSymlink(target: String!, linkName: String!): Directory!
  withTimestamps(timestamp: Int!): Directory!
  withoutDirectory(path: String!): Directory!
  withoutFile(path: String!): Directory!
  withoutFiles(paths: [String!]!): Directory!
  filter(
    exclude: [String!] = []
    include: [String!] = []
    gitignore: Boolean = false
  ): Directory!
  changes(from: ID!): Changeset!
  diff(other: ID!): Directory!
  export(path: String!, wipe: Boolean = false): String!
}

type File implements Node {
  id: ID!
  sync: ID!
  name: String!
  digest(excludeMetadata: Boolean = false): String!
  size: Int!
  stat: Stat
  contents(offsetLines: Int, limitLines: Int): String!
  export(path: String!, allowParentDirPath: Boolean = false): String!
}

type Changeset implements Node {
  id: ID!
  sync: ID!
  before: Directory!
  after: Directory!
  addedPaths: [String!]!
  modifiedPaths: [String!]!
  removedPaths: [String!]!
  isEmpty: Boolean!
  layer: Directory!
  export(path: String!): String!
}

type Stat implements Node {
  id: ID!
  name: String!
  size: Int!
  permissions: Int!
  fileType: FileType
}

type Secret implements Node { id: ID! name: String! plaintext: String! }
type CacheVolume implements Node { id: ID! }
type EnvVariable implements Node { id: ID! name: String! value: String! }
"""


class KnownFieldsRule(ValidationRule):
    """Says of a field that is missing here that it is Dagger's."""

    def enter_field(self, node: FieldNode, *_: Any) -> None:
        """Look at one field of a query."""
        parent = self.context.get_parent_type()
        if parent is not None and self.context.get_field_def() is None:
            self.report_error(
                GraphQLError(
                    f"the embedded engine has no {parent.name}.{node.name.value}; "
                    "a real Dagger engine has",
                    node,
                )
            )


_RULES = tuple(
    KnownFieldsRule if rule is FieldsOnCorrectTypeRule else rule for rule in specified_rules
)


def make_schema() -> GraphQLSchema:
    """Build the schema."""
    return build_schema(SDL)


async def answer(
    schema: GraphQLSchema, root: object, query: str, variables: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Answer one query; errors are part of the answer."""
    try:
        document = parse(query)
    except GraphQLError as error:
        return {"errors": [error.formatted]}
    if errors := validate(schema, document, _RULES):
        return {"errors": [error.formatted for error in errors]}
    result = execute(
        schema,
        document,
        root_value=root,
        variable_values=dict(variables or {}),
        field_resolver=_resolve,
        type_resolver=lambda value, _info, _type: type(value).__name__,
    )
    if isinstance(result, Awaitable):
        result = await result
    return dict(result.formatted)


def _resolve(parent: Any, info: "GraphQLResolveInfo[Any]", /, **arguments: Any) -> Any:
    value = getattr(parent, python_name(info.field_name))
    if not callable(value):
        return value
    return value(**{python_name(name): argument for name, argument in arguments.items()})


def python_name(name: str) -> str:
    """Spell a GraphQL name as a method or an argument."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return f"{snake}_" if keyword.iskeyword(snake) else snake
