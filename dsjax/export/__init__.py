# SPDX-License-Identifier: Apache-2.0
"""Export: merged weights or a PEFT adapter, proven.

In: a run, or its trained arrays. Out: a folder that transformers or PEFT loads. The parts:
`command`, `run` (write and prove), `merge` (what changed), `peft`, `verify` (the logits), `folder`
(whose a folder is), `model_card`, `disk_space`, `convert` (the command). Not done here: training.
"""
