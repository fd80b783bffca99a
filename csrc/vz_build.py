"""Builds `vmette._vz`: the C API over Virtualization.framework (vz_shim.h) behind cffi, for macOS.

vmette itself runs machines by vmette-vz, a process for each. This module is for a Python that carries the entitlement
com.apple.security.virtualization itself.
"""

from __future__ import annotations

import cffi

ffi = cffi.FFI()

# As vz_shim.h has it, and says what it means.
ffi.cdef("""
    struct vz_error { char domain[64]; int64_t code; char text[512]; };

    enum vz_rosetta { VZ_ROSETTA_NOT_SUPPORTED, VZ_ROSETTA_NOT_INSTALLED, VZ_ROSETTA_INSTALLED };
    struct vz_capabilities {
        bool supported, entitled, save_restore;
        enum vz_rosetta rosetta;
        uint32_t macos[3], min_cpus, max_cpus;
        uint64_t min_memory, max_memory;
    };
    void vz_capabilities(struct vz_capabilities *result);

    struct vz_port { const char *name; int fd; };
    struct vz_disk { const char *path; bool read_only, kept; };
    struct vz_share { const char *tag, *path; bool read_only; };
    struct vz_config {
        const char *kernel, *initrd, *cmdline;
        uint32_t cpus;
        uint64_t memory;
        int console;
        const struct vz_port *ports;
        size_t port_count;
        const struct vz_disk *disks;
        size_t disk_count;
        const struct vz_share *shares;
        size_t share_count;
        const char *rosetta;
        bool network;
        const char *mac;
        bool vsock, entropy, balloon;
        const uint8_t *identifier;
        size_t identifier_size;
    };
    bool vz_validate(const struct vz_config *config, struct vz_error *error);
    bool vz_validate_save(const struct vz_config *config, struct vz_error *error);

    struct vz_machine;
    typedef void (*vz_ended)(void *context, const struct vz_error *error);
    extern "Python" void vmette_vz_ended(void *context, const struct vz_error *error);
    struct vz_machine *vz_create(const struct vz_config *config, vz_ended ended, void *context,
                                 struct vz_error *error);
    void vz_release(struct vz_machine *machine);

    enum vz_state {
        VZ_STOPPED, VZ_RUNNING, VZ_PAUSED, VZ_ERROR, VZ_STARTING, VZ_PAUSING, VZ_RESUMING, VZ_STOPPING, VZ_SAVING,
        VZ_RESTORING
    };
    enum vz_state vz_state(struct vz_machine *machine);
    bool vz_start(struct vz_machine *machine, struct vz_error *error);
    bool vz_pause(struct vz_machine *machine, struct vz_error *error);
    bool vz_resume(struct vz_machine *machine, struct vz_error *error);
    bool vz_stop(struct vz_machine *machine, struct vz_error *error);
    bool vz_request_stop(struct vz_machine *machine, struct vz_error *error);
    bool vz_save(struct vz_machine *machine, const char *path, struct vz_error *error);
    bool vz_restore(struct vz_machine *machine, const char *path, struct vz_error *error);
    size_t vz_identifier(struct vz_machine *machine, uint8_t *buffer, size_t size);

    int vz_vsock_connect(struct vz_machine *machine, uint32_t port, struct vz_error *error);
    typedef void (*vz_accepted)(void *context, uint32_t port, int fd);
    extern "Python" void vmette_vz_accepted(void *context, uint32_t port, int fd);
    bool vz_vsock_listen(struct vz_machine *machine, uint32_t port, vz_accepted accepted, void *context,
                         struct vz_error *error);
    void vz_vsock_unlisten(struct vz_machine *machine, uint32_t port);
""")

ffi.set_source(
    "vmette._vz",
    '#include "vz_shim.h"\n',
    sources=["csrc/vz_shim.m"],
    include_dirs=["csrc"],
    depends=["csrc/vz_shim.h"],
    # The wrapper that cffi writes names parameters that it does not use.
    extra_compile_args=[
        "-O2",
        "-fobjc-arc",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
        "-Wno-missing-field-initializers",
    ],
    extra_link_args=[
        word for name in ("Foundation", "CoreFoundation", "Security", "Virtualization") for word in ("-framework", name)
    ],
    py_limited_api=True,
)
