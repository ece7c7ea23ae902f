# Sourced after environment.sh by the scripts that take --cluster as their first argument: takes it off their arguments.
# Afterwards, "${with[@]}" COMMAND... runs a command, with a cluster of its own if that was asked for.
with=(env)
if [ "${1:-}" = --cluster ]; then
    shift
    with=("$project/ci/cluster/with")
fi
