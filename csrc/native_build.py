"""Builds `vmette._native`: the C helpers behind cffi, in API mode and for the limited ABI."""

from __future__ import annotations

import cffi

ffi = cffi.FFI()

ffi.cdef("""
    int vmette_copy_into(const char *root, const char *relative, const char *source, unsigned mode);
    struct vmette_tree { uint64_t entries, bytes; int64_t newest; };
    int vmette_stat_tree(const char *root, struct vmette_tree *result);
    int vmette_spawn(const char *path, char *const argv[], char *const envp[], const int *fds, const int *targets,
                     int count);
    uint32_t vmette_tsc_khz(void);
""")

ffi.set_source(
    "vmette._native",
    '#include "inject.h"\n#include "spawn.h"\n#include "tsc.h"\n',
    sources=["csrc/inject.c", "csrc/spawn.c", "csrc/tsc.c"],
    include_dirs=["csrc"],
    depends=["csrc/inject.h", "csrc/spawn.h", "csrc/tsc.h"],
    # The wrapper that cffi writes names parameters that it does not use.
    extra_compile_args=[
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
        "-Wno-missing-field-initializers",
    ],
    py_limited_api=True,
)
