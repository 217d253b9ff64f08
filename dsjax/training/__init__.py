# SPDX-License-Identifier: Apache-2.0
"""Training: what trains, the step, the loop, and what a run leaves on disk.

In: a `RunConfig`. Out: trained arrays, checkpoints, logs. The parts, as a run passes them:
`run_dir` (its files), `resume` and `continuation` (what an earlier run left), `setup` (model and
partition), `run_data` (rows), `announcement`, `compilation`, `partition`, `state` and `step` (one
`jax.jit`), `optimizer`, `loss_scale`, `rounding`, `loop`, `evaluation`, `eval_results`,
`checkpoint` and `restore`, `conclusion`; `meter`, `metrics_log`, `event_file`, `loss_plot`,
`console`, `profiling`, `flops` (what a run shows). Not done here: the order of a whole run
(`dsjax.train`).
"""
