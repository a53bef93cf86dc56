#!/bin/sh
# Runs a payload on a workspace, keeps its result, and ends as its command did.
#
#   run.sh PAYLOAD WORKSPACE RESULT
#
# Needs `dagger` and an engine. MOONMIND_MODULE is the module's address; without it,
# the current directory is a checkout of this project. For secrets, add
# --secrets=env://NAME to the call, once for each name of the payload's secretEnv.
set -eu
payload=$1 workspace=$2 result=$3

if [ -e "$result" ]; then
    echo "run.sh: $result is there already; the result of another run?" >&2
    exit 2
fi
# Succeeds after a failure of the task too: then there is something to keep.
dagger --progress=dots -m "${MOONMIND_MODULE:-.}" call run \
    --payload="$payload" --workspace="$workspace" result export --path="$result"
tail -n 20 "$result/logs/runner.log" >&2
exit "$(cat "$result/exit-code")"
