#!/bin/sh
# Runs a command in the container: it takes this shell's place, so that signals reach it.
set -eu
# With a user that the image does not know (docker run --user) there is no home, and torch asks for the user's name.
if [ ! -w "${HOME:-/}" ]; then
    export HOME=/tmp
fi
export USER="${USER:-trainer}"
if [ ! -w outputs ]; then
    echo "error: user $(id -u) may not write to $PWD/outputs; mount a folder that it owns, or run with --user" >&2
    exit 2
fi
exec "$@"
