# SPDX-License-Identifier: Apache-2.0
"""Kinds of storage that hold frozen matrices in fewer bits: a file each, numerics on both sides.

In: a file's tensor. Out: the arrays that hold it, made on the host; and on a device the numbers
that these stand for. Not done here: the seam (`models.storage`), which matrices (`models.build`).
"""
