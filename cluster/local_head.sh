#!/usr/bin/env bash
# A Ray head with token authentication on this machine, to try `distprune submit` out. Runs until Ctrl-C.
#   cluster/local_head.sh [FOLDER]      FOLDER holds the token and Ray's files (default ~/.distprune-head); keep its path short
# Run it where `python` and `ray` are those of the environment that distprune is installed in. Ports: GCS 6399, dashboard 8299,
# overridden by GCS_PORT and DASHBOARD_PORT.
set -euo pipefail

folder=$(realpath -m "${1:-$HOME/.distprune-head}")
port=${GCS_PORT:-6399}
dashboard=${DASHBOARD_PORT:-8299}

if [ "${#folder}" -gt 35 ]; then # Ray puts Unix sockets below it, whose paths end at 107 characters
    echo "The path $folder is too long. Give one of at most 35 characters, such as /tmp/head." >&2
    exit 2
fi
mkdir -p "$folder"
token="$folder/auth_token"
if [ ! -s "$token" ]; then
    (umask 077 && python -c "import secrets; print(secrets.token_hex(32), end='')" >"$token")
fi
chmod 600 "$token"

unset RAY_ADDRESS RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"

cat <<END
In another terminal, once the lines of Ray say "Ray runtime started":
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
  distprune submit configs/digits.yaml --address http://127.0.0.1:$dashboard

END
exec ray start --head --block --disable-usage-stats \
    --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --dashboard-agent-listen-port="$((dashboard + 1))" --ray-client-server-port="$((dashboard + 2))" \
    --temp-dir="$folder/ray" --object-store-memory=200000000
