/* A cgroup for each command: what it used is counted there, and all of its processes can be killed there.
 *
 * The parent, with the limits for all commands, is made by init. Where there is none, nothing is counted and nothing
 * done. The parent is held by a descriptor: what a command mounts over its path does not matter. */
#ifndef VMETTE_CGROUP_H
#define VMETTE_CGROUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef CGROUP_PARENT
#define CGROUP_PARENT "/sys/fs/cgroup/vmette"
#endif

struct cgroups {
    int parent;         /* -1: there are none */
    uint32_t left[256]; /* those in which a command that has ended left processes; the oldest first */
    size_t left_count;
    bool due;    /* one of them may be empty now: cgroups_sweep is to look */
    bool frozen; /* see cgroups_freeze */
};

void cgroups_open(struct cgroups *g);
void cgroups_close(struct cgroups *g);

/* Makes the cgroup of command `id` and returns its directory; -1 with errno. */
int cgroup_make(const struct cgroups *g, uint32_t id);

/* Kills all processes in it with SIGKILL. False: it cannot. */
bool cgroup_kill(const struct cgroups *g, uint32_t id);

/* The most bytes that its processes held together, and how many of them were killed for lack of memory. False: the
 * kernel does not say. */
bool cgroup_peak(const struct cgroups *g, uint32_t id, uint64_t *bytes);
bool cgroup_oom_kills(const struct cgroups *g, uint32_t id, uint32_t *count);

/* Has all that runs there stand still, and waits until it does, but not for ever: what waits in the kernel for something
 * that does not come has nothing to say meanwhile either. Where nothing runs, nothing is done. */
void cgroups_freeze(struct cgroups *g);
void cgroups_thaw(struct cgroups *g);

/* Waits, but not for long, until the processes that were killed there have died: the host is told of an end of all. */
void cgroup_await_death(const struct cgroups *g, uint32_t id);

/* The command has ended: cgroups_sweep removes the cgroup, now or when there are no more processes in it. */
void cgroup_remove(struct cgroups *g, uint32_t id);
void cgroups_sweep(struct cgroups *g);

#endif
