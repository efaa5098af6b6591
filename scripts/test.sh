#!/usr/bin/env bash
# Installs what tests need and runs all of them: ruff, then pytest. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install "[test]" test

cd "$root"
"$bin/ruff" check .
"$bin/ruff" format --check .
exec "$bin/python" -m pytest "$@"
