#!/bin/sh
# Makes the passwords, keys and tokens that docker-compose.yml and k8s/base read, each in a file of
# its own. What exists is kept, so it may be repeated:  make-secrets.sh [DIRECTORY]
set -eu
directory=${1:-secrets}
command -v openssl >/dev/null || { echo "make-secrets: openssl is not installed" >&2; exit 1; }

# Others are kept out by the directory. The files themselves are readable, because Compose mounts them
# one by one, with the permissions that they have here, into containers that run as other users.
mkdir -p "$directory"
chmod 0700 "$directory"
umask 022

# write NAME: standard input, whole or not at all
write() { (umask 077; cat >"$directory/.$1.part"); chmod 0644 "$directory/.$1.part"; mv "$directory/.$1.part" "$directory/$1"; }
missing() { [ ! -s "$directory/$1" ]; }

if missing admin.token; then openssl rand -hex 32 | write admin.token; fi
if missing redis.password; then openssl rand -hex 32 | write redis.password; fi
if missing session.key; then openssl genpkey -algorithm ed25519 | write session.key; fi
if missing grafana.password; then openssl rand -hex 32 | write grafana.password; fi
# The other two follow from these.
printf 'redis://:%s@redis:6379/0\n' "$(cat "$directory/redis.password")" | write redis.url
openssl pkey -in "$directory/session.key" -pubout | write session.pub

echo "secrets are in $directory/ (mode 0700); admin.token signs you in"
