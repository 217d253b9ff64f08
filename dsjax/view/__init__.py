# SPDX-License-Identifier: Apache-2.0
"""View: what runs left in their folders, as one page that a browser opens without a network.

In: the folders of runs. Out: an HTML file. The parts: `command`, `snapshot` (a folder -> plain
values), `page` (values -> HTML); `page.html` and `page.css`, and the page's script: `marks.js`,
`curves.js`, `page.js`. Not done here: what a run writes (`training`). jax is not imported.
"""
