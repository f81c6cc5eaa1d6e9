#!/bin/sh
# Compiles the HLO modules of this folder for --target=@TARGET@ with the Neuron SDK's neuronx-cc. Runs anywhere, no
# device is needed. Written by fluxkiln; it can be stopped and started again at any time.
#
#   ./compile_neff.sh               compile what is not finished: hlo/*.hlo_module.pb -> neff/*.neff
#   ./compile_neff.sh double tail   these modules only, so that several machines or shells can share the work
#
# Exit codes: 0 all finished, 1 a compile failed, 2 no module of that name, 4 a module is missing or was changed,
# 5 there is no Neuron compiler.
set -u

say() { printf '%s\n' "$*" >&2; }

if ! compiler=$(command -v neuronx-cc); then
    say "neuronx-cc is not on PATH. Install the Neuron SDK (PyPI's package of that name is a placeholder without the"
    say "command), or activate its environment, and run this script again. Nothing was compiled."
    exit 5
fi
case $compiler in
    /*) ;;
    *) compiler=$PWD/$compiler ;;
esac
printed=$("$compiler" --version 2>&1 </dev/null)
version=$(printf '%s\n' "$printed" |
    sed -n 's/^.*NeuronX Compiler version \([0-9][0-9A-Za-z.+_-]*\).*$/\1/p' | head -n 1)
if [ -z "$version" ]; then
    say "$compiler is no Neuron compiler: --version printed: $printed"
    say "PyPI's package neuronx-cc is a placeholder; install the Neuron SDK's. Nothing was compiled."
    exit 5
fi

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
cd -- "$here" || exit 1
# Flags that frameworks take from the environment are not meant here.
unset NEURON_CC_FLAGS

names='@NAMES@'
only=" $* "
for name in "$@"; do
    case " $names " in
        *" $name "*) ;;
        *)
            say "There is no module '$name'; there are: $names"
            exit 2
            ;;
    esac
done

chosen() {
    case $only in
        "  " | *" $1 "*) return 0 ;;
        *) return 1 ;;
    esac
}

if command -v sha256sum >/dev/null 2>&1; then
    sha256() { sha256sum <"$1" | cut -d ' ' -f 1; }
else
    sha256() { shasum -a 256 <"$1" | cut -d ' ' -f 1; }
fi

# check_module FILE SHA256
check_module() {
    if [ ! -f "$1" ]; then
        say "$1 is missing; copy the whole folder again."
        exit 4
    fi
    found=$(sha256 "$1")
    if [ "$found" != "$2" ]; then
        say "$1 has the sha256 $found, it was written with $2: it was changed or damaged. Copy the folder again."
        exit 4
    fi
}

# record NAME SHA256 FLAGS-AS-JSON SHA256-OF-THE-OUTPUT: what is written beside it, one line of JSON
record() {
    printf '{"compiler":"%s","flags":%s,"hlo":"sha256:%s","name":"%s","neff":"sha256:%s","schema":"%s"}\n' \
        "$version" "$3" "$2" "$1" "$4" '@SCHEMA@'
}

work=neff/.work.$$
kept=0
made=0
failed=''

# compile_module NAME FILE SHA256 FLAGS-AS-JSON FLAG...
compile_module() {
    name=$1 file=$2 digest=$3 json=$4
    shift 4
    chosen "$name" || return 0
    output=neff/$name.neff
    if [ -f "$output" ] && [ -f "neff/$name.json" ] &&
        [ "$(cat "neff/$name.json")" = "$(record "$name" "$digest" "$json" "$(sha256 "$output")")" ]; then
        say "$name: finished before by neuronx-cc $version, kept"
        kept=$((kept + 1))
        return 0
    fi
    rm -rf "$work"
    mkdir "$work" || exit 1
    say "$name: compiling; log: $here/neff/$name.log"
    (cd "$work" && exec "$compiler" compile --framework=XLA "../../$file" --output "$name.neff" "$@") \
        >"neff/$name.log" 2>&1 </dev/null
    code=$?
    if [ -f "$work/log-neuron-cc.txt" ]; then
        cp "$work/log-neuron-cc.txt" "neff/$name.log-neuron-cc.txt"
    fi
    if [ "$code" -ne 0 ] || [ ! -s "$work/$name.neff" ]; then
        say "$name: FAILED, neuronx-cc ended with $code:"
        tail -n 5 "neff/$name.log" | sed 's/^/    /' >&2
        failed="$failed $name"
        rm -rf "$work"
        return 0
    fi
    record "$name" "$digest" "$json" "$(sha256 "$work/$name.neff")" >"$work/$name.json"
    mv -f "$work/$name.neff" "$output" || exit 1
    mv -f "$work/$name.json" "neff/$name.json" || exit 1
    # the bundle holds what its manifest will name, and a log says something where it failed
    rm -rf "$work" "neff/$name.log" "neff/$name.log-neuron-cc.txt"
    made=$((made + 1))
    say "$name: finished"
}

@CHECKS@

mkdir -p neff || exit 1
for old in neff/.work.*; do
    # what a killed run left behind
    if [ -d "$old" ] && ! kill -0 "${old##*.}" 2>/dev/null; then
        rm -rf "$old"
    fi
done
trap 'rm -rf "$work"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

say "neuronx-cc $version for @TARGET@, @COUNT@ modules: $names"
@COMPILES@

if [ -n "$failed" ]; then
    say "Failed:$failed. Their logs are in $here/neff; $made compiled and $kept from before are kept."
    exit 1
fi
say "Finished: $made compiled, $kept from before, in $here/neff. Go on with: fluxkiln compile --resume"
