# shellcheck shell=bash
# What script/up and script/test share: saying things, finding what a machine lacks, installing it, the .venv.
# Sourced with the repository as the working directory.

# shellcheck disable=SC2034  # used by the scripts that source this file
readonly root=$PWD
export LC_ALL=C.UTF-8  # messages of apt and dpkg are read here
readonly qemu_minimum=9.1
log=${TMPDIR:-/tmp}/nagaya-${0##*/}-$(id -u).log

# --- saying things ----------------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }

fail() { # WHAT WHY NEXT…: every failure says all three
    printf '\nFailed: %s\n   Why: %s\n' "$1" "$2" >&2
    shift 2
    local line first=' Next: '
    for line in "$@"; do
        printf '%s%s\n' "$first" "$line" >&2
        first='       '
    done
    exit 1
}

# Nothing ends in silence: a command that failed where nobody expected it is named.
set -o errtrace
trap 'fail "${BASH_SOURCE[0]:-$0} line $LINENO: $BASH_COMMAND" "it ended with exit code $?" "See the lines above, and $log"' ERR

now_ms() { echo $(( ${EPOCHREALTIME/[.,]/} / 1000 )); }

seconds_since() { # MILLISECONDS, as now_ms gave them
    local passed=$(( $(now_ms) - $1 ))
    printf '%d.%d s' $((passed / 1000)) $((passed % 1000 / 100))
}

logged() { # WHAT COMMAND…: output goes to the log; when the command fails its last lines are shown
    local what=$1 from status=0
    shift
    from=$(wc -l <"$log")
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null || status=$?
    if ((status)); then
        printf '\nThe last lines of %s:\n' "$log" >&2
        tail -n "+$((from + 1))" "$log" | tail -n 30 | sed 's/^/   | /' >&2
        fail "$what" "\`$*\` ended with exit code $status" \
            "Mend what the lines above say and run $0 again; it goes on where it stopped." \
            "Everything is in $log."
    fi
}

open_log() {
    # A name in a shared directory could be a link that somebody else made: only a file of ours is written.
    if [[ -L $log || (-e $log && ! -O $log) ]]; then
        log=$(mktemp "${TMPDIR:-/tmp}/nagaya-${0##*/}-XXXXXX.log")
    fi
    (umask 077 && : >"$log")
}

# --- the machine ------------------------------------------------------------------------------------------------

os_release() { # FIELD
    (
        unset ID VERSION_ID VERSION_CODENAME PRETTY_NAME
        # shellcheck source=/dev/null
        [[ -r /etc/os-release ]] && . /etc/os-release
        printf '%s' "${!1:-}"
    )
}

version_at_least() { # VERSION MINIMUM
    [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]
}

emulator_of() { # ARCHITECTURE
    case $1 in
        ppc64le) echo qemu-system-ppc64 ;;
        *) echo "qemu-system-$1" ;;
    esac
}

emulator_package_of() { # ARCHITECTURE: its name in Debian 12 (backports) and 13, and in Ubuntu
    case $1 in
        x86_64) echo qemu-system-x86 ;;
        aarch64) echo qemu-system-arm ;;
        ppc64le) echo qemu-system-ppc ;;
        s390x) echo qemu-system-s390x ;;
        *) fail "no emulator for $1" "Nagaya knows x86_64, aarch64, ppc64le and s390x" "Choose among these." ;;
    esac
}

qemu_version_of() { # PROGRAM: prints nothing when it is missing or broken
    { "$1" --version 2>/dev/null || true; } | sed -n 's/^[^ ]* .*version \([0-9][0-9.]*\).*/\1/p' | head -n 1
}

may_install() { [[ $EUID == 0 ]] || command -v sudo >/dev/null; }

privileged() {
    if [[ $EUID == 0 ]]; then
        "$@"
    else
        # `env` since sudo would drop the variables that are given before the command.
        sudo -- env DEBIAN_FRONTEND=noninteractive "$@"
    fi
}

# --- packages ---------------------------------------------------------------------------------------------------

needed=()       # package names, each once
needed_qemu=()  # those that must come from a source with a new enough QEMU
apt_options=()

need() { # PACKAGE REASON
    [[ " ${needed[*]} " != *" $1 "* ]] || return 0
    needed+=("$1")
    printf '   %-22s %s\n' "$1" "$2"
}

need_command() { # COMMAND PACKAGE REASON
    PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || need "$2" "$3"
}

need_emulator() { # ARCHITECTURE
    local program package version
    program=$(emulator_of "$1")
    package=$(emulator_package_of "$1")
    version=$(qemu_version_of "$program")
    if [[ -z $version ]]; then
        need "$package" "runs $1 guests ($program is missing)"
    elif ! version_at_least "$version" "$qemu_minimum"; then
        need "$package" "runs $1 guests (QEMU $version is here, $qemu_minimum is needed)"
    else
        return 0
    fi
    needed_qemu+=("$package")
}

need_qemu_tools() {
    local version
    version=$(qemu_version_of qemu-img)
    if ! version_at_least "${version:-0}" "$qemu_minimum"; then
        need qemu-utils "makes and checks disks (qemu-img ${version:-is missing}${version:+ is here, $qemu_minimum is needed})"
        needed_qemu+=(qemu-utils)
    fi
}

# The system's own Python comes first: a .venv made from it can be used by every user of the machine.
find_python() { # sets $python, and needs packages where there is none
    local candidate
    for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        is_new_python "$candidate" || continue
        python=$(command -v "$candidate")
        if makes_venvs "$candidate"; then
            return
        fi
        if [[ $candidate == /usr/bin/python3 ]] && may_install; then
            need python3-venv "makes the .venv ($candidate lacks it)"
            return
        fi
    done
    python=/usr/bin/python3
    is_new_python "$python" || need python3 "runs Nagaya (3.11 or newer; none is here)"
    need python3-venv "makes the .venv"
}

is_new_python() { # PROGRAM: fails when it is missing, broken or older than 3.11
    "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

makes_venvs() { # PROGRAM
    "$1" -I -c 'import venv, ensurepip' 2>/dev/null
}

apt_get() {
    DEBIAN_FRONTEND=noninteractive privileged apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}

install_needed() { # installs $needed, or says what an administrator must do
    ((${#needed[@]})) || return 0
    local started command
    started=$(now_ms)
    if ! command -v apt-get >/dev/null; then
        fail "packages are missing: ${needed[*]}" \
            "this is $(os_release PRETTY_NAME); this script installs packages on Debian and Ubuntu only" \
            "Install what corresponds to them here (QEMU $qemu_minimum or newer) and run $0 again."
    fi
    command="apt-get install --no-install-recommends ${needed[*]}"
    if ! may_install; then
        [[ $(os_release VERSION_CODENAME) != bookworm ]] || command+=" -t bookworm-backports"
        fail "packages are missing: ${needed[*]}" "$(id -un) is not root, and there is no sudo here" \
            "Ask an administrator to run: $command" "Then run $0 again; nothing else needs root."
    fi
    if [[ $EUID != 0 ]]; then
        say "   sudo is asked to install these packages, and for nothing else."
        sudo -v || fail "packages are missing: ${needed[*]}" "sudo does not let $(id -un) install them" \
            "Ask an administrator to run: $command" "Then run $0 again; nothing else needs root."
    fi
    logged "reading the package lists" apt_get update
    ((${#needed_qemu[@]} == 0)) || add_source_of_newer_qemu
    say "   installing (with what these depend on: $(count_of_new_packages) packages) ..."
    logged "installing packages" apt_get "${apt_options[@]}" install --yes --no-install-recommends "${needed[@]}"
    say "   installed in $(seconds_since "$started")"
}

count_of_new_packages() {
    apt-get "${apt_options[@]}" install --simulate --no-install-recommends "${needed[@]}" 2>>"$log" | grep -c '^Inst' || true
}

# Where the distribution's QEMU is too old, its own place for newer packages is used; sets $apt_options.
add_source_of_newer_qemu() {
    local candidate
    candidate=$(candidate_version "${needed_qemu[0]}")
    if version_at_least "$candidate" "$qemu_minimum"; then
        return
    fi
    case $(os_release ID):$(os_release VERSION_CODENAME) in
        debian:bookworm)
            [[ -n $(repository_of bookworm-backports) ]] || add_backports bookworm
            apt_options=(--target-release bookworm-backports)
            ;;
        ubuntu:noble)
            say "   Ubuntu 24.04 has QEMU $candidate: adding its Cloud Archive (flamingo), which has 10.1"
            logged "installing what adds the Cloud Archive" \
                apt_get install --yes --no-install-recommends software-properties-common ubuntu-cloud-keyring
            logged "adding the Cloud Archive" privileged add-apt-repository --yes cloud-archive:flamingo
            logged "reading the package lists" apt_get update
            version_at_least "$(candidate_version "${needed_qemu[0]}")" "$qemu_minimum" ||
                fail "QEMU here is too old" "the Cloud Archive was added and could not be read (see $log)" \
                    "Make it reachable from this machine and run $0 again." \
                    "Or remove it: sudo add-apt-repository --remove cloud-archive:flamingo"
            ;;
        *)
            fail "QEMU here is too old" "$(os_release PRETTY_NAME) offers $candidate, $qemu_minimum is needed" \
                "Add a package source that has a newer QEMU, or use Debian 12 or 13, or Ubuntu 24.04 or newer."
            ;;
    esac
}

candidate_version() { # PACKAGE: the version apt would install, without its epoch; 0 for none
    apt-cache policy "$1" | sed -n 's/^ *Candidate: *\([0-9]*:\)\{0,1\}\([0-9].*\)/\2/p' | grep . || echo 0
}

repository_of() { # SUITE: the address from which apt takes this suite of the distribution's own packages
    # shellcheck disable=SC2016  # these are apt's variables
    apt-get indextargets --format '$(ORIGIN)|$(RELEASE)|$(REPO_URI)' 'Created-By: Packages' |
        awk -F '|' -v suite="$1" '/^Debian/ && $2 == suite { print $3; exit }'
}

# The machine's own source of CODENAME is written once more with the suite CODENAME-backports, so that mirror, keyring
# and options are those that its administrator chose.
add_backports() { # CODENAME
    local uri file stanza target
    uri=$(repository_of "$1")
    for file in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list; do
        [[ -n $uri && -r $file ]] || continue
        stanza=$(with_other_suite "$file" "${uri%/}" "$1" "$1-backports")
        [[ -z $stanza ]] || break
    done
    if [[ -z ${stanza:-} ]]; then
        fail "adding $1-backports" "no package source of this machine carries Debian's suite $1" \
            "Add $1-backports to /etc/apt/sources.list.d yourself and run $0 again."
    fi
    target=/etc/apt/sources.list.d/nagaya-backports.${file##*.}
    say "   Debian 12 has QEMU 7.2: adding $1-backports as $target"
    printf '%s\n' "$stanza" | privileged tee "$target" >/dev/null
    if ! apt_get update >>"$log" 2>&1 || [[ -z $(repository_of "$1-backports") ]]; then
        privileged rm -f "$target"
        tail -n 20 "$log" >&2
        fail "reading $1-backports" "$uri does not have it (the last lines of $log are above); $target is removed" \
            "Point apt at a mirror that carries $1-backports and run $0 again."
    fi
}

with_other_suite() { # FILE URI SUITE OTHER: the entry of FILE for URI and SUITE, with the suite OTHER
    if [[ $1 == *.sources ]]; then
        awk -v RS= -v FS='\n' -v uri="$2" -v suite="$3" -v other="$4" '
            tolower($0) ~ /(^|\n)enabled: *(no|false|0)/ { next }
            {
                at = 0; text = ""; found_uri = 0
                for (i = 1; i <= NF; i++) {
                    line = $i
                    if (tolower(line) ~ /^suites:/ && (" " substr(line, 8) " ") ~ ("[ \t]" suite "[ \t]")) {
                        at = i; line = "Suites: " other
                    }
                    if (tolower(line) ~ /^uris:/ && index(line " ", uri)) { found_uri = 1; line = "URIs: " uri }
                    if (tolower(line) ~ /^types:/) line = "Types: deb"
                    if (line !~ /^#/) text = text line "\n"
                }
                if (at && found_uri) { printf "%s", text; exit }
            }' "$1"
    else
        awk -v uri="$2" -v suite="$3" -v other="$4" '
            $1 == "deb" {
                for (i = 2; i < NF; i++)
                    if (($i == uri || $i == uri "/") && $(i + 1) == suite) { $(i + 1) = other; print; exit }
            }' "$1"
    fi
}

# --- the .venv --------------------------------------------------------------------------------------------------

# .venv/.nagaya says which locks it was made from; while they are the same and it works, nothing is done. The
# development lock includes the other one, so script/test's .venv serves script/up too.
make_venv() { # LOCK
    local started stamp
    started=$(now_ms)
    if ! venv_works; then
        if [[ -e .venv ]]; then
            say "   .venv is broken, was moved, or is made from another Python: making it anew"
            rm -rf .venv
        fi
        logged "making .venv" "$python" -m venv .venv
    fi
    if venv_serves "$1"; then
        say "   .venv is up to date ($(.venv/bin/python -V))"
        return
    fi
    say "   installing $(grep -c '^[a-zA-Z0-9].*==' "$1") Python packages of $1 ..."
    logged "installing Python packages" .venv/bin/python -m pip install --disable-pip-version-check --no-input \
        --require-hashes --requirement "$1"
    logged "installing Nagaya" .venv/bin/python -m pip install --disable-pip-version-check --no-input \
        --no-build-isolation --no-deps --no-index --editable .
    stamp=$(stamp_of "$1")
    [[ $1 != requirements-dev.lock ]] || stamp+=$'\n'$(stamp_of requirements.lock)
    printf '%s\n' "$stamp" >.venv/.nagaya
    say "   .venv is ready ($(.venv/bin/python -V), $(seconds_since "$started"))"
}

venv_serves() { # LOCK
    grep -qxF "$(stamp_of "$1")" .venv/.nagaya 2>/dev/null && .venv/bin/python -c 'import nagaya, msgspec' 2>/dev/null
}

stamp_of() { # LOCK
    printf '%s %s' "$1" "$(cat "$1" pyproject.toml | sha256sum | cut -d ' ' -f 1)"
}

python_behind() { # PYTHON: the interpreter that a python or a .venv's python really is
    "$1" -I -c 'import os, sys; print(os.path.realpath(sys._base_executable), *sys.version_info[:3])' 2>/dev/null
}

venv_works() { # whether .venv was made here (its scripts hold absolute paths), of $python, and runs
    .venv/bin/python -I -c 'import pip' 2>/dev/null &&
        grep -qF "$root/.venv" .venv/bin/activate 2>/dev/null &&
        [[ $(python_behind .venv/bin/python) == "$(python_behind "$python")" ]]
}
