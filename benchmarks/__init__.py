# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of dilseg against PyTorch, cuDNN and torch.compile; see README.md in this folder."""
