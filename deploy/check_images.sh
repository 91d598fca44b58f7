#!/usr/bin/env bash
# Builds both images without a container engine and tests them with a prompt: on Debian 12, as root,
# with `apt-get install buildah debootstrap`. Takes as long as compiling llama.cpp for every CPU.
#
#   deploy/check_images.sh [FOLDER]
#
# FOLDER keeps the base image and the storage, so that the next run only builds what has changed.
# The base image is Debian with its own Python, since registries cannot be reached from everywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-/var/tmp/sluice-images}")
nats_port=14222 http_port=15001
export BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$folder/storage" --runroot "$folder/run" "$@"; }

mkdir -p "$folder"
if ! buildah inspect --type image sluice-base >/dev/null 2>&1; then
    rm -rf "$folder/base"
    debootstrap --variant=minbase --include=python3,python3-venv,python-is-python3,ca-certificates \
        bookworm "$folder/base" >/dev/null
    # With the certificates that the host trusts.
    cp /etc/ssl/certs/ca-certificates.crt "$folder/base/etc/ssl/certs/"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$folder/base" /
    buildah config --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$container"
    buildah commit --quiet --format docker --rm "$container" sluice-base
    rm -rf "$folder/base"
fi

base=localhost/sluice-base
for target in gateway inferer; do
    nice buildah build --layers --network host --format docker --file Containerfile \
        --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt --build-arg PYTHON_IMAGE=$base \
        --build-arg INFERER_BUILD_IMAGE=$base --build-arg INFERER_IMAGE=$base \
        --target "$target" --tag "sluice-$target" .
done

data=$(mktemp -d)
gateway=$(buildah from sluice-gateway) inferer=$(buildah from sluice-inferer)
children=()
end() {
    kill "${children[@]}" 2>/dev/null || true
    wait
    buildah rm "$gateway" "$inferer" >/dev/null
    rm -rf "$data"
}
trap end EXIT
start() { # CONTAINER SETTING... -- COMMAND...: as the image's own user
    local container=$1 settings=()
    while shift && [ "$1" != -- ]; do settings+=(--env "$1"); done
    buildah run --network host --env NATS_URL=nats://127.0.0.1:$nats_port "${settings[@]}" \
        "$container" "$@" &
    children+=($!)
}
SLUICE_STORE=1GB .venv/bin/nats-server -c deploy/nats/nats.conf -a 127.0.0.1 -p $nats_port \
    -sd "$data" 2>/dev/null &
children+=($!)
start "$gateway" GATEWAY_HOST=127.0.0.1 GATEWAY_PORT=$http_port -- python -m services.gateway
start "$inferer" -- python -m services.inferer

url=http://127.0.0.1:$http_port
for _ in {1..120}; do
    curl --silent --noproxy '*' $url/inferers | grep --quiet '"state":"idle"' && break
    sleep 1
done
curl --silent --noproxy '*' $url/inferers && echo
curl --silent --noproxy '*' --header 'Prefer: wait=120' --json '{"prompt": "hi", "max_tokens": 8}' \
    $url/jobs | tee "$data/answer" && echo
grep --quiet '"state":"SUCCESS"' "$data/answer"
