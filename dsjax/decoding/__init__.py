# SPDX-License-Identifier: Apache-2.0
"""Text from a model, token by token.

In: a model and rows of tokens. Out: their continuations. The parts: `decode` (the loop and its
cache), `sampling` (which token comes next), `detokenizer` (tokens to text as they come). Not done
here: the command line (`generate`).
"""
