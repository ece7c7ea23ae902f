# shellcheck shell=bash disable=SC2154
# Sourced after environment.sh by the scripts that take --cluster as their first argument: takes it off their arguments.
# Afterwards, "${start[@]}" COMMAND... turns the script into that command, with a cluster of its own if that was asked
# for.
start=(exec)
if [ "${1:-}" = --cluster ]; then
    shift
    start+=("$project/ci/cluster/with")
fi
