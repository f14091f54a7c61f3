"""Measured thresholds: the sizes from which one way to compute is faster than another. Sections 1 to 4
change the speed only, if a comment does not state otherwise. Section 5 selects the backend.

Each constant states its unit, its effect, and the machine and case of its measurement as far as they are recorded.
"EPYC" is the machine of decisions/0012: two cores of an AMD EPYC, AVX-512. "Not recorded" means that only the value and
its reason are known. To measure a threshold again, run the named benchmark with values around it.

Tests: tests/surface/test_limits.py
"""

from __future__ import annotations

# 1. Native code and memory

# Multiplications of a call of native code, below which it uses one thread: the work ends before a second thread has
# started. Case: steps of small models in native code (decisions/0012). Machine: not recorded.
SERIAL_PRODUCTS = 1 << 21

# Features that native code reads at once if the rows are not in memory. Case and machine: not recorded.
NATIVE_READ_AHEAD = 1 << 22

# Bytes for each thread of the lanes whose step is finished together, while they are in a cache, if the step has
# momentum or a pull. Case: benchmarks/corrections.py. Machine: EPYC, with 1 MiB and 32 MiB of cache: with 1 MiB rounds
# with a pull take 2 to 4 % longer, since the blocks cost more calls.
STEP_BYTES = 4 << 20

# Numbers that are read at once for several steps of fused layers, lanes or loop. Case: benchmarks/simulation.py.
# Machine: not recorded.
READ_AHEAD = 1 << 19

# The part of the train rows of one class from which accuracy does not select the best round. Case: a table with 6 % of
# positive rows, where the constant answer has accuracy .94. Machine: any.
IMBALANCED = 0.8

# Outputs and targets that metrics over all rows keep in memory. Case: 1 GiB of float64, a bound and not a measurement.
# Machine: any.
WHOLE_METRIC_NUMBERS = 1 << 27

# Bytes of the smallest tensor that uses the buffer pool. Case: decisions/0014; the subtraction of 20 × 199,000 numbers
# took 20 ms with fresh memory and 4 ms with reused memory. Machine: a virtual machine, 5 to 14 µs per page.
POOLED_BYTES = 1 << 20

# Bytes of the updates of a round that a robust rule keeps in memory; the others are in a file. A bound and not a
# measurement: decisions/0134. Machine: any.
ROW_BYTES = 1 << 29

# Numbers in one block of a client optimizer on the CPU. The allocator reuses temporaries of this size. It may return
# those of whole lanes to the system and request them again at every operation. Case: Adam on lanes [100, 7850] made
# 1500 page faults per step and took three times as long. Machine: not recorded.
OPTIMIZER_BLOCK = 1 << 17

# 2. The exact sum

# Numbers in one tile on the CPU: with their digits they stay in the caches. Case: benchmarks/simulation.py. Machine:
# not recorded.
SUM_TILE = 1 << 18

# Numbers in one tile on a GPU, where a kernel launch costs more. No GPU was measured (decisions/0011).
DEVICE_SUM_TILE = 1 << 24

# Numbers from which native code finds the largest faster than torch. Case: updates of the mlp of 159,010 parameters,
# benchmarks/frameworks.py (decisions/0015). Machine: two cores; the type is not recorded.
NATIVE_PEAKS = 1 << 19

# Numbers from which a second thread is faster in native code of the sum. Case and machine: as for `NATIVE_PEAKS`.
THREADED_SUM = 1 << 22

# The same if idle threads of torch may still spin on the cores; they spin for five milliseconds after an operation.
# Case: decisions/0012, benchmarks/frameworks.py. Machine: EPYC.
BUSY_THREADED_SUM = 1 << 24

# 3. Chunks and threads

# Bytes of a chunk of fused layers. They store no gradient, and a step reads all of the chunk three times. Case:
# benchmarks/simulation.py, softmax, mlp and cnn. Machine: not recorded.
FUSED_CHUNK_BYTES = 7 << 20

# Bytes of θ, gradients and updates of a chunk of lanes, which then stay in the caches of the cores. Case and machine:
# not recorded.
LANE_CHUNK_BYTES = 16 << 20

# Bytes of the updates of a chunk of the loop backend: each is written once and read once. Case: benchmarks/shapes.py
# (decisions/0013). Machine: not recorded.
LOOP_CHUNK_BYTES = 64 << 20

# Bytes of the padded rows of clients of different padded lengths that share a chunk. The Python code of a chunk takes
# 1.4 ms, and the arithmetic of the rows of a small linear model takes less. Case: 139 clients, 28 features, float64,
# `distributed_gd` with `linear`. Machine: two cores; the type is not recorded.
JOINED_BYTES = 8 << 20

# Clients of a chunk: least, most on the CPU, and most on a device with its own memory. No GPU was measured
# (decisions/0011); otherwise case and machine are not recorded.
LEAST_CHUNK = 4
MOST_CHUNK = 1024
MOST_DEVICE_CHUNK = 1 << 14

# Clients of a round from which other chunk sizes are tried while a training runs. Case and machine: not recorded.
TUNED_CLIENTS = 16

# Rounds for which a chunk size is timed. The fastest counts, since other programs can only slow a round down. Case and
# machine: not recorded.
TUNED_ROUNDS = 3

# Ratio of speeds from which another chunk size counts as faster; a smaller ratio may be noise. Case and machine: not
# recorded.
FASTER_RATIO = 1.03

# Largest factor between a tried chunk and the chunk for the model's size, up or down. Case and machine: not recorded.
FURTHEST_CHUNK = 8.0

# Parameters below which one thread is fastest for lanes and fused layers. Case and machine: not recorded.
SERIAL_PARAMETERS = 100_000

# Parameters from which a pass over the model is worth a second thread in a round of native code. Below, torch uses one
# thread, because its idle threads cost a third of a round of the smallest model. Case: benchmarks/frameworks.py,
# softmax (decisions/0012). Machine: EPYC.
THREADED_PARAMETERS = 1 << 20

# 4. Worker processes and ranks

# Chunks that a worker has in its queue in a synchronous round. Case and machine: not recorded.
QUEUED_CHUNKS = 2

# Chunks for each worker and round, at least: the last ones even out differences in speed. Case and machine: not
# recorded.
CHUNKS_PER_WORKER = 4

# Seconds after which a worker is replaced if only its results are missing: about the cost of a new worker. Machine: not
# recorded.
PATIENCE_S = 2.0

# Numbers of the gradient that ranks reduce together: fewer start sooner, more cost less each. Case:
# benchmarks/data_parallel.py, 2 ranks, gloo, one thread each, layers 784, 1024, 1024, 1024, 10. Machine: not recorded.
# The last digits of a float sum over more than two ranks may depend on it.
BUCKET = 1 << 20

# Numbers of a tensor below which ranks reduce it concatenated with others. Case: gloo. Machine: not recorded.
JOINT_REDUCTION = 1 << 14

# 5. Choice of the backend; a change changes bits

# Multiplications of a run from which a native library is built. An mlp round of 2·10⁹ takes 230 ms in fused layers, so
# these take about as long as the build, 2 to 3 s. Case: benchmarks/frameworks.py, mlp (decisions/0012). Machine: EPYC.
BUILD_PRODUCTS = 2e10

# Multiplications that take as long as the Python code of one pass of fused layers, .6 ms of CPU. A gradient over all
# rows has a pass for each padded length of its clients; native code has one for all. Case: 139 clients of 5 to 119
# rows, 28 features, float64, `distributed_gd` with `linear`: 31 passes. Machine: EPYC, one thread.
PASS_PRODUCTS = 5e6

# Parameters from which `auto` takes the loop instead of lanes for plain local training: a kernel then takes longer than
# its launch, and lanes only move more memory. Case: the table of decisions/0013, one thread, batch 10; between 47,710
# and 159,010 parameters of an mlp. Machine: not recorded.
LOOP_PARAMETERS = 100_000

# Parameters up to which `lanes` is chosen for a run whose rows are on other machines, where no backend can be compared.
# A site computes one client at a time. No machine was measured.
LANES_WITHOUT_ROWS = 10**6
