#!/usr/bin/env bash
# Sets up everything that `make` needs, quick when nothing changed: system packages, .venv, build.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
while read -r package; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done < tools/system-packages.txt
if ((${#missing[@]})); then
  install="apt-get install -y --no-install-recommends ${missing[*]}"
  if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo"; else
    echo "setup: system packages are missing; run: sudo apt-get update && sudo $install" >&2
    exit 1
  fi
  echo "setup: installing ${missing[*]}"
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo $install -qq > /dev/null
fi

need() {  # program, found version, wanted version
  [ "$(printf '%s\n' "$3" "$2" | sort -V | head -n 1)" = "$3" ] && return
  echo "setup: $1 must be of version $3 or later, got ${2:-none}" >&2
  exit 1
}
need cmake "$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p')" 3.25
[ -n "${CXX:-}" ] || need g++ "$(g++ -dumpfullversion 2>/dev/null)" 12
need python3 "$(python3 -c 'import platform; print(platform.python_version())' 2>/dev/null)" 3.10

# An environment whose interpreter is gone or moved is made again.
if ! .venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
  rm -rf .venv
  python3 -m venv .venv
fi
# SLA2_CUDA=ON or OFF: with or without the CUDA backend; SLA2_CUDA_ARCHITECTURES: some of its
# architectures, as "86-real;90-real". The choice stays until the next one.
build=build/release
configure() {
  cmake --preset release ${SLA2_CUDA:+-DSLA2_CUDA="$SLA2_CUDA"} \
    ${SLA2_CUDA_ARCHITECTURES:+-DSLA2_CUDA_ARCHITECTURES="$SLA2_CUDA_ARCHITECTURES"} \
    -DSLA2_TORCH="$1" > /dev/null
}
if ! cmp -s tools/requirements.txt .venv/requirements.installed; then
  # SLA2_TORCH_INDEX=https://download.pytorch.org/whl/cpu: PyTorch without CUDA, a tenth of the size.
  echo "setup: installing Python packages (PyTorch is about 4.6 GB with CUDA; SLA2_TORCH_INDEX chooses)"
  .venv/bin/pip install --quiet --disable-pip-version-check -r tools/requirements.txt \
    ${SLA2_TORCH_INDEX:+--extra-index-url "$SLA2_TORCH_INDEX"} &
  packages=$!
  trap 'kill $packages 2> /dev/null || true' EXIT
  configure OFF  # meanwhile what needs no torch
  cmake --build $build
  wait $packages
  trap - EXIT
  cp tools/requirements.txt .venv/requirements.installed
  configure ON
elif [ -n "${SLA2_CUDA:-}" ] || [ ! -f $build/build.ninja ] ||
  ! grep -q '^SLA2_TORCH:BOOL=ON' $build/CMakeCache.txt; then
  configure ON
fi
cmake --build $build
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$PWD/python" > "$site/sla2.pth"
ln -sfn "$PWD/$build/bin/sla2" .venv/bin/sla2
