# SPDX-License-Identifier: Apache-2.0
"""Llama, Qwen2 and Qwen3: every dense DeepSeek model and distill."""
