# SPDX-License-Identifier: Apache-2.0
"""Plan: whether a run fits on devices that are not here, by their own compiler.

In: a `RunConfig` and the name of a slice or cluster. Out: memory, collectives, time. The parts:
`command`, `topologies` (devices to compile for), `plan` (one run), `search` (variants of it),
`roofline`, `report` (as text). Not done here: running anything.
"""
