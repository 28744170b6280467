#!/usr/bin/env bash
# prepare_stores.sh FOLDER LENT TORCH NAME...: what tests of stores on other people's components need: programs of the system, and
# the environments NAME in FOLDER, each with the packages of requirements/stores-NAME.txt. LENT is the environment of rootcellar,
# TORCH one that has torch. What cannot be installed, or not in time, is said, and its tests are skipped.
set -uo pipefail
folder=$1 lent=$2 torch=$3
shift 3
wanted=(redis-server bindfs fuse3 libibverbs1 librdmacm1 libnuma1 procps)
patience=${PATIENCE:-600}  # seconds for each environment, and for the system's programs

missing=()
for package in "${wanted[@]}"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if ((${#missing[@]})); then
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        timeout "$patience" bash -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null' \
            apt "${missing[@]}" || echo "not installed: ${missing[*]}"
    else
        echo "not installed (needs apt and root): ${missing[*]}"
    fi
fi

# environment NAME FROM: one with the packages of requirements/stores-NAME.txt, and those of FROM behind them.
environment() {
    local name=$1 from=$2 here=$folder/$1
    cmp -s "requirements/stores-$name.txt" "$here/installed.txt" && return
    echo "Setting up $here (once; it takes a minute or a few) ..."
    rm -rf "$here" && "$lent/bin/python" -m venv --without-pip "$here" || return
    timeout "$patience" "$lent/bin/python" -m pip --python "$here/bin/python" install --quiet --quiet \
        --disable-pip-version-check --no-compile --no-deps -r "requirements/stores-$name.txt" \
        || { echo "not installed: $name"; rm -rf "$here"; return; }
    "$here/bin/python" -c 'import pathlib, sys, sysconfig
here = sysconfig.get_path("purelib")
lent = str(pathlib.Path(sys.argv[2], pathlib.Path(here).relative_to(pathlib.Path(sys.argv[1]).resolve())).resolve())
pathlib.Path(here, "lent.pth").write_text(f"import site; site.addsitedir({lent!r})\n")' "$here" "$from"
    cp "requirements/stores-$name.txt" "$here/installed.txt"
}

for name in "$@"; do
    case $name in
        lmcache | aibrix) environment "$name" "$torch" ;;
        *) environment "$name" "$lent" ;;
    esac
done
