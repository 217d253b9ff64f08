# SPDX-License-Identifier: Apache-2.0
"""What may sit in a module's slot: each kind of slot says what it hands over, and what it asks.

In: nothing. Out: protocols. A slot is empty (None) or holds an adapter's module, whose arrays are
`AdapterParam` and `AdapterBuffer`; the paths of the base are the same either way. Not done here:
any adapter.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int


class Dropout(NamedTuple):
    """What adapters drop of their inputs: for each token what its number says, wherever it lies.

    So masks do not depend on the mesh, nor on the microbatches that a batch is split into.

    Attributes:
        key: of the step, of a layer or of a module.
        token: number of each token in the whole batch.
    """

    key: jax.Array
    token: Int[Array, "B T"]

    def fold_in(self, number: Int[Array, ""] | int) -> "Dropout":
        """Make the dropout of a layer or a module that has this number."""
        return self._replace(key=jax.random.fold_in(self.key, number))

    def keep(self, p: float | Float[Array, ""], size: int) -> Bool[Array, "B T I"]:
        """Choose the inputs that stay, each with probability p.

        Args:
            p: a probability.
            size: I, inputs of a token.
        """

        def of_token(token: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(self.key, token), p, (size,))

        return jax.vmap(jax.vmap(of_token))(self.token)


@runtime_checkable
class LinearMap(Protocol):
    """A linear map without what is in its slot: it is called as the map is.

    Its weight is decoded when it is read, so a method that only calls the map pays nothing.
    """

    @property
    def weight(self) -> Float[Array, "*E O I"]:
        """This layer's kernel in Hugging Face's layout: [O, I], of routed experts [E, O, I].

        It is decoded where it is held in another storage than `dense`, and may be wider than x.
        """
        ...

    @property
    def bias(self) -> Float[Array, " O"] | None:
        """What the map adds to W x; None without, as in routed experts."""
        ...

    @property
    def divided_by(self) -> str | None:
        """Mesh axis over whose devices I is divided, inside `shard_map`; None: all of I is here."""
        ...

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """W x + b in x's dtype."""
        ...


@runtime_checkable
class LinearSlot(Protocol):
    """In a linear map: it is handed the map itself, so that it may change what goes in as well."""

    def __call__(self, x: jax.Array, linear: LinearMap, dropout: Dropout | None) -> jax.Array:
        """Apply the adapted map to x [..., I]: y [..., O], in x's dtype."""
        ...

    def merged_weight(self, weight: Float[Array, "O I"]) -> Float[Array, "O I"]:
        """Return the weight, in float32, with which the map alone is the adapted one."""
        ...


@runtime_checkable
class ExpertSlot(Protocol):
    """In a linear map of routed experts, for rows that are sorted by expert.

    On a mesh all that it is handed is one device's: its experts, and of O or I its part where the
    mesh divides the experts' width; what it gives is summed over the devices that divide I.
    """

    def __call__(
        self, x_ZI: Float[Array, "Z I"], linear: LinearMap, sizes_E: Int[Array, " E"]
    ) -> Float[Array, "Z O"]:
        """Apply the adapted map to every group of rows."""
        ...


class PrefixShape(NamedTuple):
    """What a layer's attention holds of one token of a prefix: a key and a value of this shape."""

    kv_heads: int
    head_dim: int


@runtime_checkable
class PrefixSlot(Protocol):
    """In every stack's attention, where it has plain keys and values: tokens before every row.

    Attributes:
        length: how many.
    """

    length: int

    def __call__(
        self, k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]
    ) -> tuple[Float[Array, "B Z K H"], Float[Array, "B Z K H"]]:
        """Keys and values with the prefix before them."""
        ...
