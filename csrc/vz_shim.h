/* Apple's Virtualization.framework as a plain C API: one handle, one virtual machine. No policy, no parsing.
 *
 * vz_shim.m is the real one (macOS 13 and later); tests/fake_vz/ has a stand-in that runs QEMU, for other systems.
 *
 * Threads: any thread may call, and functions wait for their result. Each machine has a serial queue of its own, on
 * which everything that the framework wants there happens, callbacks too: from within a callback, call nothing here.
 * No run loop is needed.
 *
 * Ownership: what a function is given stays the caller's and is copied if it is kept. Descriptors of a configuration
 * (ports, console) are the exception: they must stay open until vz_release. Descriptors that come out are the
 * receiver's to close.
 *
 * Errors: a function that can fail returns false, NULL or -1, and then fills `*error`, unless that is NULL. */
#ifndef VMETTE_VZ_SHIM_H
#define VMETTE_VZ_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct vz_error {
    char domain[64]; /* the NSError's, such as "VZErrorDomain"; "vmette" if the shim itself says no */
    int64_t code;
    char text[512]; /* one line of UTF-8: what failed, and the reason if the framework gives one */
};

/* --- What there is on this computer ----------------------------------------------------------------------------- */

enum vz_rosetta { VZ_ROSETTA_NOT_SUPPORTED, VZ_ROSETTA_NOT_INSTALLED, VZ_ROSETTA_INSTALLED };

struct vz_capabilities {
    bool supported;    /* VZVirtualMachine.supported: the computer can virtualize */
    bool entitled;     /* this process carries com.apple.security.virtualization */
    bool save_restore; /* this macOS can save and restore a machine (14 and later, Apple silicon) */
    enum vz_rosetta rosetta;
    uint32_t macos[3]; /* major, minor, patch */
    uint32_t min_cpus, max_cpus;
    uint64_t min_memory, max_memory; /* bytes */
};

/* Cannot fail, and needs no entitlement. */
void vz_capabilities(struct vz_capabilities *result);

/* --- What a machine is made of ---------------------------------------------------------------------------------- */

struct vz_port {
    const char *name; /* what the guest finds in /sys/class/virtio-ports/ */
    int fd;           /* both directions: one end of a socket pair */
};

struct vz_disk {
    const char *path; /* a raw image of a multiple of 512 bytes */
    bool read_only;
    bool kept; /* it is to survive a crash of this computer: what the guest flushes reaches the medium */
};

struct vz_share {
    const char *tag; /* virtio-fs's, 1 to 35 bytes */
    const char *path;
    bool read_only;
};

struct vz_config {
    const char *kernel; /* on Apple silicon an uncompressed Image */
    const char *initrd; /* or NULL */
    const char *cmdline;
    uint32_t cpus;
    uint64_t memory; /* bytes, a multiple of 1 MiB */
    int console;     /* hvc0: a descriptor for both directions, or -1 for no console */
    const struct vz_port *ports;
    size_t port_count;
    const struct vz_disk *disks; /* /dev/vda and so on, in their order */
    size_t disk_count;
    const struct vz_share *shares;
    size_t share_count;
    const char *rosetta; /* the tag of a share that holds Rosetta's Linux binary, or NULL */
    bool network;        /* a network card behind NAT */
    const char *mac;     /* its address, as 52:54:00:12:34:56; NULL is a random one */
    bool vsock;
    bool entropy;
    bool balloon;
    const uint8_t *identifier; /* of vz_identifier, for a restore; NULL is a new one */
    size_t identifier_size;
};

/* Whether the framework takes `config`. Opens what it names. */
bool vz_validate(const struct vz_config *config, struct vz_error *error);

/* Whether a machine of `config` could be saved and restored. */
bool vz_validate_save(const struct vz_config *config, struct vz_error *error);

/* --- A machine --------------------------------------------------------------------------------------------------- */

struct vz_machine;

/* Called once, on the machine's queue, when the machine has ended after a start or a restore: `error` is NULL if the
 * guest powered off or vz_stop did it, and else says what happened. `error` is valid during the call. */
typedef void (*vz_ended)(void *context, const struct vz_error *error);

/* Validates `config` and makes a machine of it, stopped. NULL is an error. */
struct vz_machine *vz_create(const struct vz_config *config, vz_ended ended, void *context, struct vz_error *error);

/* Ends the machine if it has not ended, and lets go of it. No callback comes once this has returned. */
void vz_release(struct vz_machine *machine);

/* From the framework's VZVirtualMachineState. */
enum vz_state {
    VZ_STOPPED,
    VZ_RUNNING,
    VZ_PAUSED,
    VZ_ERROR,
    VZ_STARTING,
    VZ_PAUSING,
    VZ_RESUMING,
    VZ_STOPPING,
    VZ_SAVING,
    VZ_RESTORING,
};
enum vz_state vz_state(struct vz_machine *machine);

/* Each returns when it is done. */
bool vz_start(struct vz_machine *machine, struct vz_error *error);
bool vz_pause(struct vz_machine *machine, struct vz_error *error);
bool vz_resume(struct vz_machine *machine, struct vz_error *error);

/* At once, as if the power were cut. `ended` is called before this returns. */
bool vz_stop(struct vz_machine *machine, struct vz_error *error);

/* Presses the power button; what the guest makes of it is its business. */
bool vz_request_stop(struct vz_machine *machine, struct vz_error *error);

/* Saves a paused machine to the file `path`, which must not exist. macOS 14; before it an error "vmette", ENOTSUP. */
bool vz_save(struct vz_machine *machine, const char *path, struct vz_error *error);

/* Makes a stopped machine, of the same configuration and identifier, what was saved at `path`: it is paused then. */
bool vz_restore(struct vz_machine *machine, const char *path, struct vz_error *error);

/* The machine's identifier: fills at most `size` bytes of `buffer` and returns how many it has. */
size_t vz_identifier(struct vz_machine *machine, uint8_t *buffer, size_t size);

/* --- vsock --------------------------------------------------------------------------------------------------------- */

/* Connects to a port of the guest. Returns a descriptor of a stream socket, or -1. */
int vz_vsock_connect(struct vz_machine *machine, uint32_t port, struct vz_error *error);

/* Called on the machine's queue for each connection of the guest to a port that is listened at; `fd` is the callee's. */
typedef void (*vz_accepted)(void *context, uint32_t port, int fd);

/* Listens for the guest at `port`; a port can be listened at once only (error "vmette", EADDRINUSE). */
bool vz_vsock_listen(struct vz_machine *machine, uint32_t port, vz_accepted accepted, void *context,
                     struct vz_error *error);

/* Listens no more. Does nothing if nobody listens there. No call of `accepted` for it comes once this has returned. */
void vz_vsock_unlisten(struct vz_machine *machine, uint32_t port);

#endif
