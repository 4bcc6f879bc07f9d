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

[ -x .venv/bin/python ] || python3 -m venv .venv
if ! cmp -s tools/requirements.txt .venv/requirements.installed; then
  echo "setup: installing Python packages (PyTorch is about 4.6 GB with CUDA)"
  .venv/bin/pip install --quiet --disable-pip-version-check -r tools/requirements.txt
  cp tools/requirements.txt .venv/requirements.installed
fi

build=build/release
# SLA2_CUDA=ON or OFF: with or without the CUDA backend; the choice stays until the next one.
if [ -n "${SLA2_CUDA:-}" ] || [ ! -f $build/build.ninja ]; then
  cmake --preset release ${SLA2_CUDA:+-DSLA2_CUDA="$SLA2_CUDA"} > /dev/null
fi
cmake --build $build
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$PWD/python" > "$site/sla2.pth"
ln -sfn "$PWD/$build/bin/sla2" .venv/bin/sla2
