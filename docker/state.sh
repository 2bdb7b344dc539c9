#!/bin/sh
# Saves the state of the compose federation to a file, while it runs, or puts one back:
#   state.sh backup FILE
#   state.sh restore FILE    what is there now is lost; everything is stopped, and started by `up`
# The state is Redis and nothing else. Project, overlays: COMPOSE_PROJECT_NAME, COMPOSE_FILE.
set -eu
usage() { sed -n '2,4s/^# *//p' "$0" >&2; exit 2; }
[ $# -eq 2 ] || usage
action=$1 file=$2

case $action in
  backup)
    # Redis writes a consistent snapshot, and serves meanwhile.
    docker compose exec -T redis sh -euc '
      export REDISCLI_AUTH="$(cat /run/secrets/redis.password)"
      redis-cli --rdb - 2>/dev/null' >"$file.part"
    [ "$(head -c 5 "$file.part")" = REDIS ] || { echo "state: Redis gave no snapshot" >&2; exit 1; }
    mv "$file.part" "$file"
    echo "state: $(wc -c <"$file") bytes are in $file"
    ;;
  restore)
    [ "$(head -c 5 "$file")" = REDIS ] || { echo "state: $file is no snapshot of Redis" >&2; exit 1; }
    docker compose stop
    # A Redis that appends to a file reads nothing else at its start: so the snapshot is loaded by one
    # that doesn't yet, and is made to.
    docker compose run --rm --no-deps -T redis sh -euc '
      cat >/data/dump.part
      rm -rf /data/appendonlydir /data/*.aof
      mv /data/dump.part /data/dump.rdb
      cd /data
      redis-server --dir /data --port 0 --unixsocket /tmp/redis.sock --save "" --loglevel warning &
      ask() { redis-cli -s /tmp/redis.sock "$@"; }
      until ask ping 2>/dev/null | grep -q PONG; do sleep 0.2; done
      ask config set appendonly yes >/dev/null
      until ask info persistence | tr -d "\r" | grep -qx aof_rewrite_in_progress:0 &&
        ask info persistence | tr -d "\r" | grep -qx aof_rewrite_scheduled:0; do sleep 0.2; done
      ask info persistence | tr -d "\r" | grep -qx aof_last_bgrewrite_status:ok
      echo "state: $(ask dbsize) keys are restored; start with: docker compose up"
      ask shutdown nosave
      wait
      rm -f /data/dump.rdb' <"$file"
    ;;
  *) usage ;;
esac
