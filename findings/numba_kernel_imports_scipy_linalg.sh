#!/bin/sh
# numba 0.68.1: the first compiled call of a process imports scipy.linalg, whatever the kernel does.
#
# To know whether np.dot would compile, numba.np.arraymath imports scipy.linalg.cython_blas when it is loaded, and it is
# loaded before the first kernel runs, cached on disk or not. A kernel that adds integers so takes about twice as long
# to its first result where SciPy happens to be installed: 0.28 s instead of 0.14 s on the machine this was seen on.
# A command-line tool of cached kernels pays it at every start, and its users see it only once they install SciPy.
#
# Exit 0: as described. Exit 1: it has changed. Seen with numba 0.68.1, numpy 2.4.6, scipy 1.17.1.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numba==0.68.1 numpy==2.4.6 scipy==1.17.1
cat > "$work/kernel.py" <<'PYTHON'
import sys
import time

import numba


@numba.njit(cache=True)
def one_more(x):
    return x + 1


before = "scipy.linalg" in sys.modules
begun = time.perf_counter()
assert one_more(1) == 2
print(f"first result after {time.perf_counter() - begun:.2f} s", file=sys.stderr)
hits = sum(one_more.stats.cache_hits.values())
print(before, "scipy.linalg.cython_blas" in sys.modules, hits)
PYTHON
cd "$work"
"$work/venv/bin/python" kernel.py > /dev/null
found=$("$work/venv/bin/python" kernel.py)
test "$found" = "False True 1"
echo "the first call of a kernel that was cached on disk imported scipy.linalg"
