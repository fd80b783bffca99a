"""Linux's numbers, which the guest's agent speaks in, on hosts that have others (macOS)."""

from __future__ import annotations

import errno
import os
import sys

# fmt: off
ERRNO = {
    11: "EAGAIN", 35: "EDEADLK", 36: "ENAMETOOLONG", 37: "ENOLCK", 38: "ENOSYS", 39: "ENOTEMPTY", 40: "ELOOP",
    61: "ENODATA", 62: "ETIME", 71: "EPROTO", 74: "EBADMSG", 75: "EOVERFLOW", 84: "EILSEQ", 87: "EUSERS",
    88: "ENOTSOCK", 90: "EMSGSIZE", 92: "ENOPROTOOPT", 93: "EPROTONOSUPPORT", 95: "EOPNOTSUPP",
    97: "EAFNOSUPPORT", 98: "EADDRINUSE", 99: "EADDRNOTAVAIL", 100: "ENETDOWN", 101: "ENETUNREACH",
    103: "ECONNABORTED", 104: "ECONNRESET", 105: "ENOBUFS", 106: "EISCONN", 107: "ENOTCONN", 110: "ETIMEDOUT",
    111: "ECONNREFUSED", 112: "EHOSTDOWN", 113: "EHOSTUNREACH", 114: "EALREADY", 115: "EINPROGRESS",
    116: "ESTALE", 122: "EDQUOT", 125: "ECANCELED", 130: "EOWNERDEAD",
}
# fmt: on
"""errno(3), as far as macOS has these too and by another number: include/uapi/asm-generic/errno.h."""

_NUMBERS = {name: number for number, name in ERRNO.items()} | {"ENOTSUP": 95, "ENOATTR": 61}
"""The other way round. The two more are macOS's."""


def errno_of(local: int | None) -> int:
    """Linux's number of an error of this host's; EIO for one that Linux does not have."""
    if local is None:
        return errno.EIO
    if sys.platform != "linux":
        same = local <= 34 and local != errno.EDEADLK
        return _NUMBERS.get(errno.errorcode.get(local, ""), local if same else errno.EIO)
    return local


def strerror(number: int) -> str:
    """What an error of the guest's is called."""
    if sys.platform != "linux":
        if (name := ERRNO.get(number)) is not None:
            number = getattr(errno, name, number)
        elif number > 34:  # those up to there are the same everywhere
            return f"error {number} of Linux"
    return os.strerror(number)
