# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels on a CPU; see README.md."""
