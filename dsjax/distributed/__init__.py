# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: meshes, shardings, and the hosts of a run as one.

In: the `mesh` section, a launcher's environment, arrays. Out: where every array lies, and what all
processes agree on. The parts: `mesh` and `sharding` (devices), `arrays` (parts of arrays on hosts),
`launchers`, `coordinator`, `bootstrap`, `processes` (from single processes to one run),
`jax_internals` (what of jax is not public),
`checksums`, `lock_file` (one process at a time), `devices` (what the makers say of each),
`compiled` (what a compiled program says of itself). Not done here: models; a file's content.
"""
