# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's own architectures: MoE-16B, V2, V3 (with R1) and V3.2."""
