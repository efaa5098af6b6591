#!/usr/bin/env bash
# Installs what tests need and runs all of them: ruff, then pytest, the files of tests spread over two processes.
# Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install "[test]" test
# A browser looks at the report in one test, which is skipped where none is there and none can be installed.
if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 || true
fi

cd "$root"
"$bin/ruff" check .
"$bin/ruff" format --check .
exec "$bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"
