# SPDX-License-Identifier: Apache-2.0
"""What it takes to build dilseg: toolchain probing, the ninja file, and the PEP 517 backend.

Only the standard library is imported at module level, so every module here also works in the bare
environment that pip creates for an isolated build.
"""
