# SPDX-License-Identifier: Apache-2.0
"""What tests share: backends, sample inputs, memory layouts, slow references and closeness."""
