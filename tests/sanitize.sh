#!/bin/sh
# Run the tests of native code under the address and undefined-behaviour sanitizers: compiled by gcc, and by clang if it
# is installed with its runtime. The first report, or a compiler warning, ends the tests with an error.
#
#     tests/sanitize.sh PYTHON [ARGUMENT OF PYTEST …]
set -eu
python=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT

# Leaks are not checked: Python and torch keep memory until the process ends. A failed allocation returns 0, as it does
# without sanitizers. Reports go to stderr, so pytest must not capture file descriptors.
run() {
    SANITIZE_CC=$1 SANITIZE_FLAGS=$2 preload=$3
    shift 3
    export SANITIZE_CC SANITIZE_FLAGS
    echo "== native code under the sanitizers of $SANITIZE_CC"
    mkdir "$cache/$SANITIZE_CC"
    CC=$here/sanitize_cc.sh ATOLL_CACHE=$cache/$SANITIZE_CC OMP_NUM_THREADS=1 \
        ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD=$preload \
        "$python" -m pytest -q -n 0 --capture=sys -p no:cacheprovider -m "not slow" \
        "$here/identities/test_exact.py" "$here/identities/test_numerics.py" \
        "$here/identities/test_dropout.py" "$here/identities/test_precision.py" \
        "$here/identities/test_bounded_rows.py" "$here/identities/test_pull.py" "$here/identities/test_discrete_gaussian.py" "$@"
}

run gcc "" "$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$@"
if command -v clang >/dev/null; then
    runtime=$(clang -print-file-name="libclang_rt.asan-$(uname -m).so")
    if [ -f "$runtime" ]; then
        run clang -shared-libasan "$runtime" "$@"
    else
        echo "clang has no sanitizer runtime: install libclang-rt-dev to check its build, too"
    fi
fi
