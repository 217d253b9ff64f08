# SPDX-License-Identifier: Apache-2.0
"""Generate: the command that lets a model answer. Not done here: how it does (`decoding`)."""
