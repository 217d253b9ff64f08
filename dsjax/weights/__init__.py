# SPDX-License-Identifier: Apache-2.0
"""Weights on disk: Hugging Face directories, FP8, torch files, PEFT adapters, dsjax's own form.

In: a path, URL or hub id. Out: a `Source` whose tensors are read in pieces, arrays on their
devices, and folders written whole or not at all. The parts: `storage` and `hub` (bytes),
`safetensors` and `torch_bin` (tensors), `model_folder`, `model_files` and `hf_directory` (a model's
folder), `dsjax_format`, `fp8`, `source` (what all have in common), `load` (to devices), `write` (a
checkpoint like its source), `convert` (one form to the other), `peft` and `adapter` (adapters),
`folders`, `generation_config`. Not done here: what training changed.
"""
