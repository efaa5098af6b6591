#!/usr/bin/env bash
# A minute of video from the model in the box: out/minute.mp4. Arguments go to `longvid generate`.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install "" run

case " $* " in
    *" --output "* | *" --output="* | *" --help "* | *" -h "*) exec "$bin/longvid" generate "$@" ;;
esac
mkdir -p "$root/out"
video="$root/out/minute.mp4"
number=2
while [ -e "$video" ] || [ -e "${video%.mp4}.json" ]; do # what was made before stays
    case " $* " in *" --overwrite "*) break ;; esac
    video="$root/out/minute-$number.mp4"
    number=$((number + 1))
done
exec "$bin/longvid" generate --output "$video" "$@"
