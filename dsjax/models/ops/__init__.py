# SPDX-License-Identifier: Apache-2.0
"""Operations with kernels of their own, each equal to a plain path in value and gradient.

In: activations. Out: the same numbers on every device; the mesh's devices decide which kernel runs.
Not done here: modules.
"""
