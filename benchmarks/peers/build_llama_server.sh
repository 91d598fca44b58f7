#!/usr/bin/env bash
# Compile llama.cpp's own server into .venv/peers/llama-server, once: from the source inside the
# llama-cpp-python that Sluice pins, so that both sides run the same version of llama.cpp, and with
# the same recipe and CMAKE_ARGS. `make bench-peers` calls it. JOBS is how many compilers run at once.
set -euo pipefail
cd "$(dirname "$0")/../.."

peers=$PWD/.venv/peers
folder=$peers/llama-server
pin=$(grep -i '^llama[-_]cpp[-_]python==' constraints.txt)

echo "compiling llama.cpp's server; this takes several minutes, once" >&2
if [ ! -e "$folder/$pin" ]; then # else it was interrupted, and goes on
    rm -rf "$folder"
    mkdir -p "$folder/sdist"
    PIP_CONSTRAINT=$PWD/constraints.txt "$peers/bin/pip" download --quiet \
        --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
        --dest "$folder/sdist" "$pin"
    tar -xzf "$folder"/sdist/*.tar.gz --strip-components=1 -C "$folder/sdist"
    touch "$folder/$pin"
fi

"$peers/bin/cmake" -S "$folder/sdist/vendor/llama.cpp" -B "$folder/build" \
    -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_PROJECT_INCLUDE="$PWD/benchmarks/peers/llama_server.cmake" \
    -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
    ${CMAKE_ARGS:-} \
    >"$folder/cmake.log"
"$peers/bin/cmake" --build "$folder/build" --target llama-server -j "${JOBS:-$(nproc)}" \
    >"$folder/build.log" 2>&1 || { tail -n 40 "$folder/build.log" >&2; exit 1; }
