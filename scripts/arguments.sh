# What the other scripts source, for their arguments.

check_arguments() { # at most $1 of the following: -h prints the first comment of the script; other options are refused
  local argument most=$1
  shift
  for argument in "$@"; do
    case $argument in
      "")
        echo "error: an argument is empty; expected a path, or no argument; see $0 --help" >&2
        exit 2
        ;;
      -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit
        ;;
      -*)
        echo "error: $argument is no option; expected --help or a folder; settings are environment variables, as EPOCHS=3 $0" >&2
        exit 2
        ;;
    esac
  done
  if [ $# -gt "$most" ]; then
    echo "error: ${!#} is one argument too many; expected at most $most, see $0 --help" >&2
    exit 2
  fi
  if ! command -v "${PYTHON:-python}" > /dev/null; then
    echo "error: there is no ${PYTHON:-python} here; make clean install, then source .venv/bin/activate, or set PYTHON" >&2
    exit 2
  fi
}

expanded() { # a path whose ~ the shell left alone, as it does in quotes
  local home=~ # $HOME, or where that is not set the user's own
  case $1 in
    "~" | "~/"*) printf '%s\n' "$home${1#\~}" ;;
    *) printf '%s\n' "$1" ;;
  esac
}
