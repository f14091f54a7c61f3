"""The same workload in FedJAX: the model in plain jax.numpy, clients by its jit backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from turns import Turns

# FedJAX 0.0.17 calls names that jax has since removed.
for place, name, now in ((jax, "tree_map", jax.tree.map), (jax, "tree_leaves", jax.tree.leaves)):
    setattr(place, name, now)
jax.tree_util.tree_multimap = jax.tree.map

import fedjax  # noqa: E402

turns = Turns()


def dense(key, wide, out):
    return jax.random.uniform(key, (wide, out), minval=-1, maxval=1) / np.sqrt(wide), jnp.zeros(out)


def filters(key, size, given, out):
    scale = np.sqrt(size * size * given)
    return jax.random.uniform(key, (size, size, given, out), minval=-1, maxval=1) / scale, jnp.zeros(out)


def maps(weights, x):
    """Compute a convolution, ReLU and a pool of 2."""
    w, b = weights
    x = jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.lax.reduce_window(jax.nn.relu(x + b), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def rows(weights, x):
    w, b = weights
    return x @ w + b


def start(key):
    keys = jax.random.split(key, 4)
    match turns.model:
        case "softmax":
            return [dense(keys[0], 784, 10)]
        case "mlp":
            return [dense(keys[0], 784, 200), dense(keys[1], 200, 10)]
        case _:
            convolutions = [filters(keys[0], 5, 1, 16), filters(keys[1], 5, 16, 32)]
            return [*convolutions, dense(keys[2], 512, 128), dense(keys[3], 128, 10)]


def forward(theta, x):
    if turns.model == "cnn":
        first, second, *theta = theta
        x = maps(second, maps(first, x))
    x = x.reshape(len(x), -1)
    *hidden, last = theta
    for weights in hidden:
        x = jax.nn.relu(rows(weights, x))
    return rows(last, x)


def loss(theta, batch, key):
    log = jax.nn.log_softmax(forward(theta, batch["x"]))
    return -jnp.take_along_axis(log, batch["y"][:, None], 1).mean()


x = turns.x.transpose(0, 2, 3, 1)
federation = {b"%06d" % i: {"x": x[part], "y": turns.y[part]} for i, part in enumerate(turns.parts)}
clients = fedjax.InMemoryFederatedData(federation)
algorithm = fedjax.algorithms.fed_avg.federated_averaging(
    jax.grad(loss),
    fedjax.optimizers.sgd(turns.lr),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=turns.batch, num_epochs=1),
)
state = algorithm.init(start(jax.random.PRNGKey(0)))
sampler = fedjax.client_samplers.UniformGetClientSampler(clients, turns.cohort, seed=0)
predict = jax.jit(forward)
for number in range(turns.rounds + 1):
    turns.wait(lambda held, theta=state.params: np.asarray(predict(theta, held.transpose(0, 2, 3, 1))).argmax(1))
    sampler.set_round_num(number)
    state, _ = algorithm.apply(state, sampler.sample())
    jax.block_until_ready(state.params)
