# Shared by .ci/run and .ci/full; to be sourced. Afterwards the working directory is the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=$root/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

lines=()   # one per stage, for the summary
failed=0

# stage NAME COMMAND...: run, time and remember; a failing stage does not hide the ones after it
stage() {
  local name=$1 start=$SECONDS code verdict=ok
  shift
  printf '\n=== %s\n' "$name"
  # not `(...) || code=$?`: bash ignores `set -e` in whatever stands before `||`
  set +e
  (set -e; "$@")
  code=$?
  set -e
  if [ "$code" -ne 0 ]; then verdict="FAILED ($code)"; failed=1; fi
  lines+=("$(printf '%-28s %5d s  %s' "$name" $((SECONDS - start)) "$verdict")")
  printf '=== %s: %s\n' "$name" "$verdict"
}

# stage_if PATH NAME COMMAND...: a stage that needs an input which a plain clone does not have
stage_if() {
  local input=$1 name=$2
  shift
  if [ -e "$input" ]; then
    stage "$@"
  else
    printf '\n=== %s\nabsent: %s\n' "$name" "$input"
    lines+=("$(printf '%-28s          absent: %s' "$name" "$input")")
  fi
}

# the README's command N (its one-line commands, in order: 1 trains, 2 tests)
readme_command() {
  grep '^python3 -m venv .venv && ' README.md | sed -n "${1}p" | grep .
}

run_readme_command() {
  local command
  command=$(readme_command "$1")
  echo "$command"
  bash -c "$command"
}

# The README's test command without its last part, which runs the tests.
install() {
  local command
  command=$(readme_command 2)
  echo "${command% && *}"
  bash -c "${command% && *}"
}

# Those that start processes get a second try: gloo was seen to abort while a process exits, once in some twenty runs.
# cases CLASSES: the open cases, for a comma-separated list of classes, or all
cases() {
  local run=("$python" -m pytest -q -p no:cacheprovider ../shared/cases/open)
  export CASES_OPTIMIZERS=$1 PYTHONDONTWRITEBYTECODE=1
  "${run[@]}" -m "not dist"
  "${run[@]}" -m dist || "${run[@]}" -m dist
}

# integrations MARKS: with the real trainers; torchvision comes with a test dependency, made for another torch, and they
# import it where it is
integrations() {
  "$root/.venv/bin/pip" install -q -c constraints.txt -e ".[integrations]"
  "$root/.venv/bin/pip" uninstall -q -y torchvision
  "$python" -m pytest -m "$1" tests/integrations
}

golden() { GOLDEN_DIR=../shared/golden "$python" -m pytest -n 2 tests/test_golden.py tests/test_golden_triton.py; }

# finish: the summary; the exit code says whether every stage passed
finish() {
  printf '\n=== summary (%d s)\n' "$SECONDS"
  printf '%s\n' "${lines[@]}"
  exit "$failed"
}
