#!/bin/sh
# Makes a certificate authority and the certificates of the two services that listen, for
# docker-compose.tls.yml:  make-certs.sh [DIRECTORY] [NAME...]
# Each NAME is a further host name or IP address under which the services are reached from outside.
# The authority is kept; certificates are made anew when they are missing, end within 30 days, or when
# names are given.
set -eu
directory=${1:-certs}
[ $# -eq 0 ] || shift
command -v openssl >/dev/null || { echo "make-certs: openssl is not installed" >&2; exit 1; }

# As in make-secrets.sh: closed by the directory, because containers of other users read the files.
mkdir -p "$directory"
chmod 0700 "$directory"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

names=""
for name in "$@"; do
  case $name in
    *:*) names="$names,IP:$name" ;;
    *[!0-9.]*) names="$names,DNS:$name" ;;
    *) names="$names,IP:$name" ;;
  esac
done

new_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }

if [ ! -s "$directory/ca.key" ] || [ ! -s "$directory/ca.crt" ]; then
  new_key "$work/ca.key"
  openssl req -x509 -new -key "$work/ca.key" -days 3650 -subj "/CN=FedNano authority" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -out "$work/ca.crt"
  chmod 0600 "$work/ca.key"  # no container gets this one
  chmod 0644 "$work/ca.crt"
  mv "$work/ca.key" "$work/ca.crt" "$directory/"
fi

for service in coordinator llm; do
  file=$directory/$service
  if [ -z "$names" ] && [ -s "$file.key" ] &&
    openssl x509 -in "$file.crt" -noout -checkend 2592000 >/dev/null 2>&1 &&
    openssl verify -CAfile "$directory/ca.crt" "$file.crt" >/dev/null 2>&1; then
    continue
  fi
  # A renewal keeps the names that the old one had.
  alternatives="DNS:$service,DNS:localhost,IP:127.0.0.1$names"
  if [ -z "$names" ] && [ -s "$file.crt" ]; then
    alternatives=$(openssl x509 -in "$file.crt" -noout -ext subjectAltName | tail -1 |
      sed 's/IP Address:/IP:/g; s/ //g')
  fi
  new_key "$work/key"
  openssl req -new -key "$work/key" -subj "/CN=$service" -out "$work/request"
  {
    echo "basicConstraints=critical,CA:FALSE"
    echo "keyUsage=critical,digitalSignature"
    echo "extendedKeyUsage=serverAuth"
    echo "subjectAltName=$alternatives"
  } >"$work/extensions"
  openssl x509 -req -in "$work/request" -CA "$directory/ca.crt" -CAkey "$directory/ca.key" \
    -set_serial "0x$(openssl rand -hex 16)" -days 397 -extfile "$work/extensions" \
    -out "$work/crt" 2>/dev/null
  chmod 0644 "$work/key" "$work/crt"
  mv "$work/key" "$file.key"
  mv "$work/crt" "$file.crt"
  echo "made $file.crt for $(openssl x509 -in "$file.crt" -noout -ext subjectAltName | tail -1 | sed 's/^ *//'), until $(openssl x509 -in "$file.crt" -noout -enddate | cut -d= -f2)"
done
echo "certificates are in $directory/ (mode 0700); sites need $directory/ca.crt only"
