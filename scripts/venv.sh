# Sourced by the other scripts: makes .venv in the checkout with what "$1" asks for (". " or ".[test]"), once.
# A stamp remembers what was installed, so that later starts cost nothing.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bin="$root/.venv/bin"

find_python() {
    for python in python3 python3.11 python3.12 python3.13; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "Python 3.11 or newer is needed and was not found; install it and run this again" >&2
    return 1
}

install() {
    local stamp="$root/.venv/installed-$2" want
    want="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $(cd "$root" && echo */__init__.py) $root"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && return
    local python
    python="$(find_python)" || exit 1
    echo "installing into $root/.venv (once; a few minutes)" >&2
    [ -x "$bin/python" ] || "$python" -m venv "$root/.venv"
    "$bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" --editable "$root$1" >&2
    echo "$want" > "$stamp"
}
