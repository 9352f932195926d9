#!/usr/bin/env bash
# Two Ray nodes on this machine, to see what a cluster does, and what becomes of a search when a node is cut off or lost.
#
#   local_two_nodes.sh start             a head and a worker node; one trial at a time on each
#   local_two_nodes.sh on NAME COMMAND   run a command on a node: head, worker, or one that was added
#   local_two_nodes.sh add NAME          one node more; `add head` for a new head in the place of a lost one
#   local_two_nodes.sh cut NAME          pull the plug of its network
#   local_two_nodes.sh heal NAME         and put it in again
#   local_two_nodes.sh kill NAME         SIGKILL all of its processes at once
#   local_two_nodes.sh stop              end everything
#
# As root each node is a network namespace with an address, processes and temporary files of its own, wired by a bridge in one more
# namespace: the machine's network is not touched, and default ports are free. Without root the nodes are processes side by side on
# loopback, on other ports than Ray's own, and `cut` and `heal` are not to be had.
#
# NODES is the folder of the token and of Ray's files (default ~/.distprune-nodes; keep it short), CPUS the trials at once on a node.
# `ray` and `distprune` are those on the PATH.
set -euo pipefail

folder=$(realpath -m "${NODES:-$HOME/.distprune-nodes}")
id=dp$(printf %s "$folder" | cksum | cut -d' ' -f1)
subnet=10.210.0 # of the bridge that nobody else sees
start_s=180

fail() {
    echo "$1" >&2
    exit 2
}

# Whether this is root with the rights of root: in a container it may lack them.
isolated() {
    [ "$(id -u)" = 0 ] && command -v ip nsenter pgrep >/dev/null && unshare --net --pid --fork --mount-proc true 2>/dev/null
}

named() {
    [[ ${1-} =~ ^[a-z][a-z0-9]{0,11}$ ]] || fail "A node's name has up to 12 small letters and digits, got '${1-}'. Write head, worker, third."
}

running() {
    [ -s "$folder/$1/pid" ] || return 1
    case $(ps -o stat= -p "$(<"$folder/$1/pid")") in
        "" | Z*) return 1 ;; # gone, or gone and not yet noticed by its parent
    esac
}

exists() {
    named "${1-}"
    running "$1" || fail "There is no node '$1' that runs. Start one: $0 add $1"
}

address_of() {
    if ! isolated; then
        echo 127.0.0.1
    elif [ "$1" = head ]; then
        echo "$subnet.11"
    else
        echo "$subnet.$((20 + $(printf %s "$1" | cksum | cut -d' ' -f1) % 200))"
    fi
}

make_token() {
    mkdir -p "$folder"
    if [ ! -s "$folder/auth_token" ]; then
        (umask 077 && python -c "import secrets; print(secrets.token_hex(32), end='')" >"$folder/auth_token")
    fi
    chmod 600 "$folder/auth_token"
    unset RAY_AUTH_TOKEN RAY_ADDRESS
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/auth_token"
}

# A network namespace for a node, wired to the bridge.
plug() {
    local name=$1 address=$2
    if ! ip netns list | grep -q "^$id-net\b"; then
        ip netns add "$id-net"
        ip -n "$id-net" link add bridge type bridge
        ip -n "$id-net" link set bridge up
    fi
    ip netns add "$id-$name"
    ip -n "$id-net" link add "$name" type veth peer name eth0 netns "$id-$name"
    ip -n "$id-net" link set "$name" master bridge up
    # By its address, so that a head in the place of a lost one is found at once.
    ip -n "$id-$name" link set eth0 address "$(printf 02:00:00:00:00:%02x "${address##*.}")"
    ip -n "$id-$name" addr add "$address/24" dev eth0
    ip -n "$id-$name" link set eth0 up
    ip -n "$id-$name" link set lo up
    ip -n "$id-$name" route add default dev eth0 # Ray looks for one; it leads nowhere
}

unplug() {
    ip -n "$id-net" link delete "$1" 2>/dev/null || true
    ip netns delete "$id-$1" 2>/dev/null || true
}

add() {
    local name=$1 address arguments command node
    named "$name"
    ! running "$name" || fail "Node '$name' runs already. Give another name, or first: $0 kill $name"
    [ "$name" = head ] || running head || fail "There is no head. Start it: $0 add head"
    [ "${#folder}" -le 35 ] || # Ray puts Unix sockets below it, whose paths end at 107 characters
        fail "The path $folder is too long. Set NODES to one of at most 35 characters, such as /tmp/nodes."
    make_token
    address=$(address_of "$name")
    rm -rf "${folder:?}/$name"
    mkdir -p "$folder/$name/ray" "$folder/ray"
    # Each node reports the whole machine's memory, so the object store is kept small; trials hardly use it.
    arguments=(--disable-usage-stats --node-ip-address="$address" --object-store-memory=100000000)
    if [ "$name" = head ]; then # which runs trials here, as two nodes are all that there are
        arguments+=(--head --num-cpus="${CPUS:-1}" --dashboard-host=127.0.0.1 --temp-dir="$folder/ray")
    else
        arguments+=(--num-cpus="${CPUS:-1}")
    fi
    # bash is the node's first process: it collects orphans, and ends with Ray. `ray start --block` would end Ray when anything of it ends,
    # such as the server of Ray's client, which nobody needs and which gives up on a busy machine.
    # shellcheck disable=SC2016  # expanded there
    node='ray start "$@" && while pgrep $own --exact raylet >/dev/null; do sleep 1; done'
    if isolated; then
        unplug "$name"
        plug "$name" "$address"
        [ "$name" = head ] || arguments+=(--address="$(address_of head):6379")
        command=(ip netns exec "$id-$name" unshare --pid --fork --mount-proc --uts --kill-child
            bash -c "hostname $name && mount --bind \"\$1\" \"\$2\" && shift 2 && own= && $node" node "$folder/$name/ray" "$folder/ray")
    else
        command=(bash -c "own='--session 0' && $node" node)
        if [ "$name" = head ]; then
            arguments+=(--port=6399 --dashboard-port=8299 --dashboard-agent-listen-port=8300 --ray-client-server-port=8301)
        else # ports that would be those of the other nodes are drawn
            arguments+=(--address=127.0.0.1:6399 --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0)
        fi
    fi
    PYTHONUNBUFFERED=1 setsid "${command[@]}" "${arguments[@]}" >"$folder/$name/log" 2>&1 </dev/null &
    echo $! >"$folder/$name/pid"
    for ((waited = 0; waited < 5 * start_s; waited++)); do
        if grep -q "Ray runtime started" "$folder/$name/log"; then
            echo "node '$name' is up at $address"
            return
        fi
        if ! running "$name" || ! running head; then
            break
        fi
        sleep 0.2
    done
    tail -n 20 "$folder/head/log" "$folder/$name/log" >&2
    end "$name"
    fail "Node '$name' did not start; above is what it and the head said last."
}

on() {
    local name=$1
    shift
    exists "$name"
    make_token
    if isolated; then
        exec nsenter --target "$(pgrep -P "$(<"$folder/$name/pid")")" --mount --net --pid --uts -- env -C "$PWD" "$@"
    fi
    RAY_ADDRESS=127.0.0.1:6399 exec "$@" # there may be other Rays on this machine
}

# SIGKILL all processes of a node.
end() {
    if running "$1"; then
        kill -KILL -- "-$(<"$folder/$1/pid")" 2>/dev/null || true
    fi
    if isolated; then
        unplug "$1"
    fi
    rm -f "$folder/$1/pid"
}

wire() {
    exists "$1"
    isolated || fail "Only root can take a node's network away. Kill the node: $0 kill $1"
    ip -n "$id-net" link set "$1" "$2"
}

stop() {
    local each
    for each in "$folder"/*/pid; do
        [ ! -e "$each" ] || end "$(basename "$(dirname "$each")")"
    done
    if isolated; then
        for each in $(ip netns list | grep -o "^$id-[a-z0-9]*"); do
            ip netns delete "$each"
        done
    fi
    rm -rf "$folder/ray"
}

start() {
    local dashboard=8265
    isolated || dashboard=8299
    add head
    add worker
    cat <<END

Two nodes are up, with a token of their own in $folder/auth_token. To search on them:
  $0 on head distprune submit configs/digits.yaml --address http://127.0.0.1:$dashboard --storage "\$PWD/runs"
  $0 on head ray status
  $0 stop
END
}

case ${1-} in
    start | stop) "$1" ;;
    add | on) "$1" "${@:2}" ;;
    cut) wire "${2-}" down ;;
    heal) wire "${2-}" up ;;
    kill) exists "${2-}" && end "$2" ;;
    *) fail "Usage: $0 start | on NAME COMMAND... | add NAME | cut NAME | heal NAME | kill NAME | stop" ;;
esac
