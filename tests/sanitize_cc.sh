#!/bin/sh
# The compiler that tests/sanitize.sh gives to atoll: $SANITIZE_CC, with these flags after those of the package.
unset LD_PRELOAD # the compiler itself must not be checked
exec "$SANITIZE_CC" "$@" -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    $SANITIZE_FLAGS
