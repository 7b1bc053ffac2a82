# SPDX-License-Identifier: Apache-2.0
"""torch.library.opcheck: schema, registrations, fake kernel and tracing of an operator."""

import torch

_QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
_ALL = (*_QUICK, "test_aot_dispatch_dynamic")


def opcheck(op, args, *, traced=True) -> None:
    """Checks one call of ``op``.

    The last and slowest check traces the call and its backward with symbolic sizes. For an operator
    that is the backward of one checked with ``traced=True`` it would repeat what that one saw.
    """
    torch.library.opcheck(op.default, args, test_utils=_ALL if traced else _QUICK)
