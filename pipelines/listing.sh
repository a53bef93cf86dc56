#!/bin/sh
# Lists a directory that a command has left, for `inventory.py`: so that links can
# be looked at and files be digested inside the engine, before anything travels.
#
#   listing.sh DIRECTORY OUT BUSYBOX
#
#   OUT      gets, in one order: `names` (NUL between them), `stats` (raw mode in
#            hexadecimal and size), `links` (their targets, a NUL after each) and
#            `digests` (SHA-256 of regular files: first those whose path has no
#            line break, then the others)
#   BUSYBOX  the path of a static one, or empty where the image has the tools
#
# Runs in a fresh container of the image: the command's own may be full of traps.
out=$2 b=$3
cd "$1" || exit 1
newline='
'
# An empty $b is no word, so it is not quoted; the scripts are for the inner shell.
# shellcheck disable=SC2016,SC2086
{
    $b find . ! -name . -print0 >"$out/names"
    $b find . ! -name . -exec $b stat -c '%f %s' {} + >"$out/stats"
    $b find . -type l -exec $b sh -c 'for l; do $0 readlink -n "$l"; printf "\0"; done' "$b" {} + >"$out/links"
    {
        $b find . -type f ! -path "*$newline*" -exec $b sha256sum {} +
        $b find . -type f -path "*$newline*" -exec $b sh -c 'for f; do $0 sha256sum <"$f"; done' "$b" {} +
    } >"$out/digests"
}
