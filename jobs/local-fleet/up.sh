#!/usr/bin/env bash
# A fleet on this machine to try the job files on: Consul, a Nomad server and four clients, two "drones" and two "gateways".
#
#   jobs/local-fleet/up.sh [FOLDER]      until Ctrl-C, which stops all of it; FOLDER keeps data and logs [a temporary one]
#
# Everything listens on loopback: the server on 127.0.0.1, clients on 127.0.0.11 to 127.0.0.14. With it up, in another terminal:
#
#   nomad job run -var 'host=${meta.mesh_host}' -var 'api_host=${meta.mesh_host}' \
#     -var 'consul=http://${meta.mesh_host}:8500' -var 'data_dir=FOLDER/mesh/${node.unique.name}' jobs/node-agent.nomad.hcl
#   mesh model deploy smollm2-135m --nomad --replicas 2 --agent '${meta.mesh_host}:7070' --api http://127.0.0.11:8080
#
# Needs consul and nomad (1.1 or newer) on the PATH, and root or cgroups that Nomad may write for drivers other than raw_exec.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
clients=(drone-1:drone:127.0.0.11 drone-2:drone:127.0.0.12 gateway-1:gateway:127.0.0.13 gateway-2:gateway:127.0.0.14)
deadline_s=60

for program in consul nomad; do
    command -v "$program" > /dev/null || { echo "$program is not on the PATH: install it, then start the fleet again" >&2; exit 2; }
done
if [ $# -gt 1 ]; then
    echo "usage: up.sh [FOLDER]" >&2
    exit 2
fi
temporary=
folder=${1:-}
if [ -z "$folder" ]; then
    temporary=$(mktemp -d "${TMPDIR:-/tmp}/fleet-XXXXXX")
    folder=$temporary
fi
mkdir -p "$folder/logs"
folder=$(cd "$folder" && pwd)

pids=() nomads=()
stop() {
    trap - EXIT INT TERM
    echo "stopping the fleet"
    # Nomad ends in order, and is not waited for without an end; Consul has nothing to lose.
    for pid in "${nomads[@]}"; do kill -TERM "$pid" 2> /dev/null || true; done
    for ((tick = 0; tick < 100; tick++)); do
        alive=0
        for pid in "${nomads[@]}"; do kill -0 "$pid" 2> /dev/null && alive=1; done
        [ "$alive" = 0 ] && break
        sleep 0.1
    done
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2> /dev/null || true; done
    if [ -n "$temporary" ]; then rm -rf "$temporary"; fi
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

run() { # NAME COMMAND...: in the background, its output in logs/NAME.log
    local name=$1
    shift
    "$@" > "$folder/logs/$name.log" 2>&1 &
    pids+=($!)
    if [ "$1" = nomad ]; then nomads+=($!); fi
}

answers() { # WHAT COMMAND...: wait until it succeeds
    local what=$1
    shift
    for ((tick = 0; tick < deadline_s * 5; tick++)); do
        if "$@" > /dev/null 2>&1; then return 0; fi
        for i in "${!pids[@]}"; do
            kill -0 "${pids[i]}" 2> /dev/null || { echo "a part of the fleet ended; see $folder/logs" >&2; exit 1; }
        done
        sleep 0.2
    done
    echo "$what is not there after $deadline_s s; see $folder/logs" >&2
    exit 1
}

other_ports() { # I: all dynamic ports of Nomad but the I-th range of two thousand
    local from=$((20000 + $1 * 2000)) below=""
    [ "$from" -gt 20000 ] && below="20000-$((from - 1)),"
    echo "$below$((from + 2000))-32000"
}

run consul-server consul agent -server -bootstrap-expect=1 -node=server -bind=127.0.0.1 -client=127.0.0.1 \
    -dns-port=-1 -data-dir="$folder/consul-server"
answers "Consul's leader" consul operator raft list-peers -http-addr=http://127.0.0.1:8500
sed "s|FOLDER|$folder|g" "$here/server.hcl" > "$folder/server.hcl"
run nomad-server nomad agent -config="$folder/server.hcl"

for i in "${!clients[@]}"; do
    IFS=: read -r name class host <<< "${clients[i]}"
    run "consul-$name" consul agent -node="$name" -bind="$host" -client="$host" -retry-join=127.0.0.1 \
        -dns-port=-1 -data-dir="$folder/consul-$name"
    sed -e "s|FOLDER|$folder|g" -e "s|NAME|$name|g" -e "s|CLASS|$class|g" -e "s|HOST|$host|g" \
        -e "s|PORTS|$(other_ports "$i")|" "$here/client.hcl" > "$folder/$name.hcl"
    run "nomad-$name" nomad agent -config="$folder/$name.hcl"
done

joined() { [ "$(consul members -http-addr=http://127.0.0.1:8500 2> /dev/null | grep -c ' alive ')" -gt "${#clients[@]}" ]; }
ready() { [ "$(nomad node status -address=http://127.0.0.1:4646 2> /dev/null | grep -c ' ready')" -ge "${#clients[@]}" ]; }
answers "a Consul with ${#clients[@]} clients" joined
answers "a Nomad with ${#clients[@]} clients" ready
echo "the fleet is up: Consul at http://127.0.0.1:8500, Nomad at http://127.0.0.1:4646, its files in $folder; Ctrl-C stops it"
# Until one of them ends: a fleet with a part missing says so.
wait -n || true
echo "a part of the fleet ended; see $folder/logs" >&2
exit 1
