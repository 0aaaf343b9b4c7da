#!/usr/bin/env bash
# A small cluster on this machine: one server, attention and expert workers as processes of their own.
# Ctrl-C ends it. Needs a build (./dev build).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: deploy/local_cluster.sh [-m MODEL] [-a ATTENTION_WORKERS] [-e EXPERT_WORKERS] [-p PORT] [-- SERVER FLAGS]

  -m  checkpoint folder (models/demo)     -a  attention workers (1)
  -p  HTTP port (8000)                    -e  expert workers (2)

Logs go to build/local_cluster/. `curl localhost:PORT/admin/cluster` shows the workers; kill one and watch.
TEXT
}

model=models/demo attention=1 experts=2 port=8000
while getopts "m:a:e:p:h" flag; do
  case "$flag" in
    m) model=$OPTARG ;;
    a) attention=$OPTARG ;;
    e) experts=$OPTARG ;;
    p) port=$OPTARG ;;
    h) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ "${1:-}" = "--" ] && shift

binary=build/release/bin/switchyard
[ -x "$binary" ] || { echo "$binary is missing: run ./dev build" >&2; exit 1; }
control=$((port + 1000))
logs=build/local_cluster
mkdir -p "$logs"
SWITCHYARD_CLUSTER_TOKEN=$(head -c 24 /dev/urandom | base64)
export SWITCHYARD_CLUSTER_TOKEN
pids=()
stop() {
  trap - EXIT INT TERM
  [ "${#pids[@]}" -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
  wait
}
trap stop EXIT INT TERM

"$binary" server --model "$model" --port "$port" --grpc-port $((port + 1)) --control-port "$control" "$@" \
  >"$logs/server.log" 2>&1 &
pids+=($!)
start() {  # start ROLE NUMBER
  "$binary" worker --role "$1" --name "$1-$2" --scheduler "127.0.0.1:$control" --model "$model" \
    >"$logs/$1-$2.log" 2>&1 &
  pids+=($!)
}
for ((i = 0; i < attention; i++)); do start attention "$i"; done
for ((i = 0; i < experts; i++)); do start expert "$i"; done
echo "server: pid ${pids[0]}, http://127.0.0.1:$port, control port $control; logs in $logs/"
until grep -q '^switchyard ready' "$logs/server.log"; do
  kill -0 "${pids[0]}" 2>/dev/null || { tail -n 5 "$logs/server.log" >&2; exit 1; }
  sleep 0.1
done
grep '^switchyard ready' "$logs/server.log"
wait "${pids[0]}"
